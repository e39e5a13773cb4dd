"""Where a training's rows go besides the disk: into the trackers that the trainer has open, and never in its way."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cache import random_state_kept
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.review import load_review, visits_of
from grpo_toolkit.tracking import tensorboard, trackers, trackio, wandb
from grpo_toolkit.tracking.breaker import Breaker
from grpo_toolkit.tracking.console import wandb_hint
from grpo_toolkit.tracking.wandb_environment import prepare_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import TrainingArguments

    from grpo_toolkit.latency.review import Review
    from grpo_toolkit.tracking.wandb import Pages

logger = logging.getLogger(__name__)


class Mirror:
    """Logs into the runs that the trainer opened; one breaker per tracker lasts for a whole training.

    Args:
        artifact: also record each export as a W&B artifact, by reference.
    """

    def __init__(self, *, artifact: bool = False) -> None:
        self.artifact = artifact
        self._begin()

    def _begin(self) -> None:
        self.breakers = {"W&B": Breaker(), "Trackio": Breaker(), "TensorBoard": Breaker()}
        self.runs: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()
        self._known_in_table: set[str] = set()
        self._has_said_none = False

    def prepare(self, args: TrainingArguments) -> None:
        """When the trainer is made, before W&B starts: its files, its timeouts, offline without an answer."""
        if "wandb" in args.report_to and args.should_log and (problem := prepare_environment(args.output_dir)):
            logger.warning(
                "grpo_toolkit: the W&B server does not work (%s); this run is offline, in the output folder, and "
                "`wandb sync` uploads it later",
                problem,
            )

    def begin(self, folder: Path) -> None:
        """When training begins: which runs are open, noted on disk in case this process does not live to log."""
        self._begin()
        try:
            before = load_review(folder)
        except InputError:
            before = None
        if before is not None:  # a run that is gone on with has them, or a replay brings them
            self._known = {row.id for row in before.rows}
        breaker = self.breakers["W&B"]
        run = wandb.active_run()
        if run is not None:
            breaker.call("scalars", lambda: self.runs.update(wandb=wandb.run_facts(run)))
        if (opened := trackio.open_run()) is not None:
            self.runs["trackio"] = opened
        for tracker, facts in self.runs.items():
            trackers.remember(folder, tracker, facts, before)

    def log(self, review: Review, pages: Pages, args: TrainingArguments) -> Iterator[str]:
        """Mirror what is new; yields what a person should read."""
        with random_state_kept():
            hints = [*self._log_wandb(review, pages), *self._log_trackio(review, pages)]
            hints += self._log_tensorboard(review, args)
        yield from hints
        for name, breaker in self.breakers.items():
            if (news := breaker.news()) is not None:
                replay = {"W&B": "--replay wandb", "Trackio": "--replay trackio"}.get(name)
                again = "" if replay is None else f"; later: grpo-toolkit report {review.path} {replay}"
                logger.warning(
                    "grpo_toolkit: %s did not take all of it (%s); every row is on disk%s", name, news, again
                )
        if not hints and not self._has_said_none:
            self._has_said_none = True
            yield "no W&B, Trackio or TensorBoard run is open here: the latency is in these files alone"

    def log_scalars(self, review: Review) -> None:
        """The figures alone, in the middle of a training; everything else waits for its end."""
        run = wandb.active_run()
        if run is None or "wandb" not in self.runs:
            return
        with random_state_kept():
            wandb.log_scalars(run, self._own(review, "wandb"), self.breakers["W&B"], known=self._known)

    def _own(self, review: Review, tracker: str) -> Review:
        return trackers.runs_of(review, tracker)[-1][1]

    def _log_wandb(self, review: Review, pages: Pages) -> Iterator[str]:
        facts = self.runs.get("wandb")
        run = wandb.active_run()
        if facts is None:
            return
        if run is None:
            self.breakers["W&B"].problems["scalars"] = "the run was finished before training ended"
            yield wandb_hint(facts)
            return
        wandb.log_review(
            run,
            self._own(review, "wandb"),
            pages,
            self.breakers["W&B"],
            known=self._known,
            known_in_table=self._known_in_table,
            artifact=self.artifact,
        )
        yield wandb_hint(facts)

    def _log_trackio(self, review: Review, pages: Pages) -> Iterator[str]:
        facts = self.runs.get("trackio")
        if facts is None:
            return
        own = self._own(review, "trackio")
        project, name = facts["project"], facts["name"]
        self.breakers["Trackio"].call("tables", lambda: trackio.log_review(own, pages, project=project, name=name))
        yield f"Trackio run: {name}\n  look: trackio show --project {project}"

    def _log_tensorboard(self, review: Review, args: TrainingArguments) -> Iterator[str]:
        folder = tensorboard.writer_folder(args) if "tensorboard" in args.report_to else None
        if folder is None:
            return
        for visit in visits_of(review)[-1:]:
            self.breakers["TensorBoard"].call("tables", lambda visit=visit: tensorboard.log_visit(folder, visit))  # type: ignore[misc]
        yield f"TensorBoard: {folder}"
