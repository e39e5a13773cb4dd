"""The time of steps in the trackers that the trainer has open, on the axis `train/global_step`, and its replay.

`step_time/<phase>_s`, `step_time/step_s`, `step_time/floor_s`, `step_time/mfu`, `step_time/mbu`: seconds and shares.
W&B gets each step's scalars as they come, Trackio and TensorBoard get them when training ends; W&B and Trackio then
get the charts and a table of the causes, too. The truth is `step_time.jsonl`: what a tracker missed is logged again
from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, TrackerError
from grpo_toolkit.model.live_model import random_state_kept
from grpo_toolkit.reporting.charts.step_gallery import write_step_pictures
from grpo_toolkit.reporting.terminal.console import wandb_hint
from grpo_toolkit.reporting.terminal.step_time import cause_title
from grpo_toolkit.reporting.trackers import tensorboard, tracker_runs, trackio, wandb_run
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker, Budget
from grpo_toolkit.reporting.trackers.metrics import STEP_METRIC
from grpo_toolkit.reporting.trackers.replay import Replayed
from grpo_toolkit.reporting.trackers.wandb_environment import prepare_environment

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from transformers import TrainingArguments

    from grpo_toolkit.step_time.rows import StepExplanation, StepRow
    from grpo_toolkit.step_time.store import StepReview

LAST_STEP_KEY: Final = "step_time/last_step"
"""The last step that a run has, as a replay asks for it."""

HEADLINE: Final = "step_time/step_s"
"""The scalar that gets a panel of its own in W&B; the phases are hidden there, and in one picture."""

CAUSE_COLUMNS: Final = ("cause", "saving_s", "share", "evidence", "cure", "line")
_PATIENCE_S: Final = 60.0


def step_scalars(row: StepRow) -> dict[str, float]:
    """Return the figures of one step by key; what was not measured is left out."""
    values: dict[str, float | None] = {
        **{f"step_time/{name}_s": seconds for name, seconds in row.phases_s.items()},
        "step_time/step_s": row.wall_s,
        "step_time/floor_s": row.floor_s,
        "step_time/mfu": row.mfu,
        "step_time/mbu": row.mbu,
    }
    return {name: value for name, value in values.items() if value is not None}


def cause_lines(row: StepExplanation) -> list[list[Any]]:
    """Return a line a cause, ordered as the columns."""
    return [
        [
            cause_title(found.cause),
            found.saving_s,
            None if found.saving_s is None or not row.wall_s else found.saving_s / row.wall_s,
            found.evidence,
            found.cure,
            found.line,
        ]
        for found in row.causes
    ]


class StepMirror:
    """A mirror of steps in the runs that the trainer opened; each tracker has a breaker, all share one budget."""

    def __init__(self) -> None:
        self.budget = Budget()
        self.breakers = {name: Breaker(self.budget) for name in ("W&B", "Trackio", "TensorBoard")}
        self.runs: dict[str, dict[str, Any]] = {}

    def begin(self, folder: Path, session: str) -> None:
        """Find the runs that are open when training begins, and note them on disk for a replay."""
        run = wandb_run.active_run()
        if run is not None:
            self.breakers["W&B"].call("scalars", lambda: self.runs.update(wandb=wandb_run.run_facts(run)))
        opened = trackio.open_run()
        if opened is not None:
            self.runs["trackio"] = opened
        for tracker, facts in self.runs.items():
            tracker_runs.remember_session(folder, tracker, facts, session)

    def log(self, row: StepRow) -> None:
        """Log one step to W&B, which puts it into a queue."""
        run = wandb_run.active_run()
        if run is not None and "wandb" in self.runs:
            with random_state_kept():
                self.breakers["W&B"].call("scalars", lambda: log_to_wandb(run, [row]))

    def end(self, review: StepReview, folder: Path, args: TrainingArguments) -> list[str]:
        """Log what is left at the end of training; returns what a tracker did not take, a line each."""
        with random_state_kept():
            self._end(review, folder, args)
        news = ((name, breaker.news()) for name, breaker in self.breakers.items())
        return [f"{name} did not take all step times ({what})" for name, what in news if what is not None]

    def _end(self, review: StepReview, folder: Path, args: TrainingArguments) -> None:
        is_tensorboard = "tensorboard" in args.report_to
        if not self.runs and not is_tensorboard:
            return
        pictures = write_step_pictures(review, folder) if self.runs else {}
        run = wandb_run.active_run()
        if run is not None and "wandb" in self.runs:
            self.breakers["W&B"].call("media", lambda: _wandb_pictures(run, review, pictures))
            self.breakers["W&B"].call("tables", lambda: _wandb_table(run, review))
        if "trackio" in self.runs:
            place = {name: self.runs["trackio"][name] for name in ("project", "name")}
            self.breakers["Trackio"].call("tables", lambda: log_to_trackio(review, pictures, **place))
        events = tensorboard.writer_folder(args) if is_tensorboard else None
        if events is not None:
            self.breakers["TensorBoard"].call("tables", lambda: _to_tensorboard(events, review.steps))


def log_to_wandb(run: Any, rows: Iterable[StepRow]) -> int:
    """Log a row a step; returns how many."""
    count = 0
    for row in rows:
        values = step_scalars(row)
        for name in values:
            run.define_metric(name, step_metric=STEP_METRIC, hidden=name != HEADLINE)
        run.define_metric(LAST_STEP_KEY, step_metric=STEP_METRIC, hidden=True)
        run.log({**values, LAST_STEP_KEY: row.step, STEP_METRIC: row.step})
        count += 1
    return count


def _wandb_pictures(run: Any, review: StepReview, pictures: dict[str, Path]) -> None:
    import wandb

    if pictures and review.steps:
        images = {f"step_time/charts/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
        run.log({**images, STEP_METRIC: review.steps[-1].step})


def _wandb_table(run: Any, review: StepReview) -> None:
    import wandb

    if review.explanations:
        row = review.explanations[-1]
        table = wandb.Table(columns=list(CAUSE_COLUMNS), data=cause_lines(row), allow_mixed_types=True)
        run.log({"step_time/causes": table, STEP_METRIC: row.step})


def log_to_trackio(review: StepReview, pictures: dict[str, Path], *, project: str, name: str) -> int:
    """Log the steps that a Trackio run does not have, in one go; returns how many."""
    import trackio as library

    last = _trackio_last_step(project, name)
    rows = [row for row in review.steps if row.step > last]
    if not rows:
        return 0
    library.init(project=project, name=name, resume="allow", embed=False)
    try:
        for row in rows:
            library.log({**step_scalars(row), LAST_STEP_KEY: row.step, STEP_METRIC: row.step})
        media: dict[str, Any] = {f"step_time/charts/{key}": library.Image(str(path)) for key, path in pictures.items()}
        if review.explanations and review.explanations[-1].causes:
            lines = cause_lines(review.explanations[-1])
            media["step_time/causes"] = library.Table(columns=list(CAUSE_COLUMNS), data=lines)
        if media:
            library.log({**media, STEP_METRIC: rows[-1].step})
    finally:
        library.finish()
    return len(rows)


def _trackio_last_step(project: str, name: str) -> int:
    from trackio.sqlite_storage import SQLiteStorage

    if project not in SQLiteStorage.get_projects() or name not in SQLiteStorage.get_runs(project):
        return 0
    return max((int(line.get(LAST_STEP_KEY) or 0) for line in SQLiteStorage.get_logs(project, name)), default=0)


def _to_tensorboard(folder: Path, rows: Sequence[StepRow]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(folder), filename_suffix=".step_time") as writer:
        for row in rows:
            for name, value in step_scalars(row).items():
                writer.add_scalar(name, value, row.step)


def replay_steps(review: StepReview, tracker: str) -> list[Replayed]:
    """Log the steps that a tracker's runs do not have yet, each its own sessions.

    Args:
        review: of the output folder.
        tracker: "wandb" or "trackio".

    Raises:
        InputError: there are no steps.
        TrackerError: the tracker is not installed, or did not take it.
    """
    if not review.steps:
        raise InputError(f"{review.path}: there are no steps to log")
    done = []
    for facts in tracker_runs.read(review.path).get(tracker) or [{}]:
        sessions = facts.get("sessions")
        steps = [row for row in review.steps if sessions is None or row.session in sessions]
        if steps:
            own = type(review)(path=review.path, steps=steps, explanations=review.explanations)
            done.append((_replay_wandb if tracker == "wandb" else _replay_trackio)(own, facts))
    return done


def _name_of(review: StepReview, facts: dict[str, Any]) -> str:
    return str(facts.get("id") or facts.get("name") or hashlib.sha256(review.steps[0].id.encode()).hexdigest()[:12])


def _replay_wandb(review: StepReview, facts: dict[str, Any]) -> Replayed:
    try:
        import wandb
    except ImportError as error:
        raise TrackerError("W&B is not installed: pip install wandb") from error
    prepare_environment(review.path)
    name = _name_of(review, facts)
    noted = review.path / f".step_time_{name}.json"  # of an offline run no server can be asked what it has
    is_offline = os.environ.get("WANDB_MODE") == "offline"
    place: dict[str, Any] = {"project": facts.get("project") or os.environ.get("WANDB_PROJECT", "huggingface")}
    if facts.get("entity"):
        place["entity"] = facts["entity"]
    try:
        run = wandb.init(id=name, name=facts.get("name"), resume=None if is_offline else "allow", **place)
    except Exception as error:
        raise TrackerError(f"W&B did not open the run {name} ({type(error).__name__}: {error})") from error
    breaker = Breaker(Budget(10 * _PATIENCE_S), call_s=_PATIENCE_S)
    try:
        last = _noted(noted) if is_offline else int(run.summary.get(LAST_STEP_KEY) or 0)
        rows = [row for row in review.steps if row.step > last]
        breaker.call("scalars", lambda: log_to_wandb(run, rows))
        hint = wandb_hint(wandb_run.run_facts(run))
    finally:
        run.finish()
    if breaker.problems:
        raise TrackerError(f"W&B did not take all of it ({breaker.news()}); try again")
    if is_offline and rows:
        noted.write_text(json.dumps({"last_step": rows[-1].step}), encoding="utf-8")
    return Replayed(tracker="wandb", run=name, logged=len(rows), there=len(review.steps) - len(rows), hint=hint)


def _noted(file: Path) -> int:
    return int(json.loads(file.read_text(encoding="utf-8"))["last_step"]) if file.is_file() else 0


def _replay_trackio(review: StepReview, facts: dict[str, Any]) -> Replayed:
    project, name = facts.get("project") or "huggingface", facts.get("name") or _name_of(review, facts)
    try:
        logged = log_to_trackio(review, {}, project=project, name=name)
    except ImportError as error:
        raise TrackerError("Trackio is not installed: pip install 'grpo-toolkit[trackio]'") from error
    except Exception as error:
        raise TrackerError(f"Trackio did not take it ({type(error).__name__}: {error})") from error
    hint = f"  look: trackio show --project {project}"
    return Replayed(tracker="trackio", run=name, logged=logged, there=len(review.steps) - logged, hint=hint)
