"""The mirror of a training's rows in the trackers that the trainer has open, which never gets in its way."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import is_hub_name, public_name
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.review import load_review, visits_of
from grpo_toolkit.model.live_model import random_state_kept
from grpo_toolkit.reporting.terminal.console import wandb_hint
from grpo_toolkit.reporting.trackers import tensorboard, tracker_runs, trackio, wandb_run
from grpo_toolkit.reporting.trackers.bounded_calls import BUDGET_S, Breaker, Budget, one_line
from grpo_toolkit.reporting.trackers.sheltered_callbacks import shelter, shelter_tables
from grpo_toolkit.reporting.trackers.wandb_environment import is_run_open, name_run, offline, prepare_environment
from grpo_toolkit.reporting.trackers.wandb_exit import EXIT_S, bound_exit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from transformers import TrainerCallback, TrainingArguments

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.reporting.report.page import Pages

logger = logging.getLogger(__name__)


_NAMES: Final = {"wandb": "W&B", "trackio": "Trackio", "tensorboard": "TensorBoard"}
_PATIENCE_S: Final = BUDGET_S - 0.5
"""Of the budget, for asking the server and opening the run; W&B gives up up to half a second later than it should."""


class Mirror:
    """A mirror in the runs that the trainer opened; their breakers and one budget of time last for a whole training.

    The trainer's own tracker callbacks are sheltered besides: what they raise ends in one warning. One whose run fails
    in the middle (finished early, a full disk) rests. W&B whose run does not open (a key that is refused, a server
    that is gone, also where `WANDB_MODE=online` asks for it) is opened again offline: that keeps the trainer's own
    rows too, which `report --replay` does not have, and `wandb sync` uploads all of it later. `WANDB_MODE` itself
    stays as the user set it.

    Args:
        artifact: also record each export as a W&B artifact, by reference.
    """

    def __init__(self, *, artifact: bool = False) -> None:
        self.artifact = artifact
        self._begin()

    def _begin(self) -> None:
        self.budget = Budget()
        self.breakers = {name: Breaker(self.budget) for name in _NAMES.values()}
        self.runs: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()
        self._known_in_table: set[str] = set()
        self._has_said_none = False
        self._is_over = False
        self._place: Path | None = None

    def prepare(self, args: TrainingArguments, *, base: str | None = None) -> None:
        """Prepare W&B when the trainer is made: its files, its timeouts, offline where the server does not answer.

        A run of its own gets a name, and the base's name (or folder) as its group.
        """
        self._place = Path(args.output_dir)
        shelter(args, self._failed)
        if "wandb" not in args.report_to or not args.should_log:
            return
        if not is_run_open():
            is_named = args.run_name is not None and args.run_name != args.output_dir
            group = None if not base else base if is_hub_name(base) else public_name(Path(base))
            name_run(None if is_named else Path(args.output_dir).resolve().name, group)
        started = time.monotonic()
        # A run that does not open is offline and its end takes no time, so the time for that can be used up before.
        problem = prepare_environment(args.output_dir, patience_s=_PATIENCE_S, spare_s=EXIT_S)
        self.budget.spend(time.monotonic() - started, is_fine=problem is None)
        if problem is not None and os.environ.get("WANDB_MODE") == "offline":
            self._go_offline(problem)

    def _go_offline(self, problem: str) -> None:
        self.breakers["W&B"] = Breaker(Budget())  # an offline run waits for nobody: what it takes is work of ours
        logger.warning(
            "grpo_toolkit: the W&B server does not work (%s); this run is offline, in the output folder, and "
            "`wandb sync` uploads it later",
            problem,
        )

    def _failed(
        self, callback: TrainerCallback, tracker: str, error: Exception, *, took_s: float, had_begun: bool
    ) -> AbstractContextManager[None] | None:
        """Answer a tracker's own callback that raised: open W&B offline, or let the callback rest."""
        self.budget.spend(took_s)
        if tracker == "wandb" and not had_begun and not is_run_open():
            callback._initialized = False  # it counts as set up from before it asks the server
            slow = "; WANDB_INIT_TIMEOUT gives it longer" if "init_timeout" in str(error) else ""
            self._go_offline(f"{one_line(error)}{slow}")
            return offline()
        name = _NAMES.get(tracker, tracker)
        logger.warning(
            "grpo_toolkit: %s failed (%s); training goes on without it%s", name, one_line(error), self._again(tracker)
        )
        if name in self.breakers:
            self.breakers[name].hush()
        return None

    def _again(self, tracker: str) -> str:
        """Return how the rows get into that tracker later."""
        if tracker not in ("wandb", "trackio"):
            return "; every latency row is on disk"
        return f"; every latency row is on disk, and later: grpo-toolkit report {self._place} --replay {tracker}"

    def begin(self, folder: Path) -> None:
        """Find the runs that are open when training begins, and note them on disk in case this process dies."""
        if self._is_over:
            self._begin()
        self._place = folder
        try:
            before = load_review(folder)
        except InputError:
            before = None
        if before is not None:  # a run that is gone on with has them, or a replay brings them
            self._known = {row.id for row in before.rows}
        breaker = self.breakers["W&B"]
        run = wandb_run.active_run()
        if run is not None:
            breaker.call("scalars", lambda: self.runs.update(wandb=wandb_run.run_facts(run)))
            bound_exit(run)
            shelter_tables(breaker)
        if (opened := trackio.open_run()) is not None:
            self.runs["trackio"] = opened
        for tracker, facts in self.runs.items():
            tracker_runs.remember(folder, tracker, facts, before)

    def log(self, review: Review, pages: Pages, args: TrainingArguments) -> Iterator[str]:
        """Mirror what is new; yields lines for a person to read."""
        with random_state_kept():
            hints = [*self._log_wandb(review, pages), *self._log_trackio(review, pages)]
            hints += self._log_tensorboard(review, args)
        self._is_over = True
        yield from hints
        for tracker, name in _NAMES.items():
            if (news := self.breakers[name].news()) is not None:
                logger.warning("grpo_toolkit: %s did not take all of it (%s)%s", name, news, self._again(tracker))
        if not hints and not self._has_said_none:
            self._has_said_none = True
            yield f"{'trackers':<12}no W&B, Trackio or TensorBoard run is open: files alone"

    def log_scalars(self, review: Review) -> None:
        """Mirror the figures alone, in the middle of a training; everything else waits for its end."""
        run = wandb_run.active_run()
        if run is None or "wandb" not in self.runs:
            return
        with random_state_kept():
            wandb_run.log_scalars(run, self._own(review, "wandb"), self.breakers["W&B"], known=self._known)

    def _own(self, review: Review, tracker: str) -> Review:
        return tracker_runs.runs_of(review, tracker)[-1][1]

    def _log_wandb(self, review: Review, pages: Pages) -> Iterator[str]:
        facts = self.runs.get("wandb")
        run = wandb_run.active_run()
        if facts is None:
            return
        if run is None:
            self.breakers["W&B"].problems["scalars"] = "the run was finished before training ended"
        else:
            wandb_run.log_review(
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
