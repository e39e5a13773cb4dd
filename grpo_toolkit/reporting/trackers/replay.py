"""The replay of a run's rows after an outage, a kill, or from another machine; what a tracker has is left alone.

Rows are known by `id`. W&B's server says in the run's summary which ids arrived; of an offline run its file does.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import InputError, TrackerError
from grpo_toolkit.latency.rows.review import FOLDER_NAME, visits_of
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.page import REPORT_FILE, Pages, write_report
from grpo_toolkit.reporting.terminal.console import wandb_hint
from grpo_toolkit.reporting.trackers import tracker_runs
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker, Budget
from grpo_toolkit.reporting.trackers.metrics import IDS_KEY, TABLE_IDS_KEY
from grpo_toolkit.reporting.trackers.wandb_environment import prepare_environment
from grpo_toolkit.reporting.trackers.wandb_run import log_review, logged_ids, run_facts

if TYPE_CHECKING:
    from grpo_toolkit.latency.rows.review import Review

_PATIENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The outcome of a replay: exports logged now, exports that the tracker had, and how to look at the run."""

    tracker: str
    run: str
    logged: int
    there: int
    hint: str

    def __str__(self) -> str:
        return f"{self.tracker}: {self.logged} logged now, {self.there} were there\n{self.hint}"


def replay(review: Review, tracker: str) -> list[Replayed]:
    """Log what the tracker's runs do not have yet, each its own rows.

    Args:
        review: all rows of the output folder.
        tracker: "wandb" or "trackio".

    Raises:
        InputError: nothing was measured, so there is nothing to log.
        TrackerError: the tracker is not installed, or did not take it.
    """
    if not review.rows:
        raise InputError(f"{review.path}: only explanations are in it, and a tracker gets measurements")
    report = review.path / REPORT_FILE
    pages = Pages(
        report=report if report.is_file() else write_report(review),
        pictures=write_pictures(review, review.path / "pictures"),
    )
    log = _to_wandb if tracker == "wandb" else _to_trackio
    return [log(own, pages, facts) for facts, own in tracker_runs.runs_of(review, tracker) if own.rows]


def _fresh_name(review: Review) -> str:
    """Return the same name for the same rows: a second replay of a folder without a run finds the first one's."""
    return hashlib.sha256(review.rows[0].id.encode()).hexdigest()[:12]


def _to_wandb(review: Review, pages: Pages, facts: dict[str, Any]) -> Replayed:
    try:
        import wandb
    except ImportError as error:
        raise TrackerError("W&B is not installed: pip install wandb") from error
    if os.environ.get("WANDB_MODE") == "disabled":
        raise InputError("WANDB_MODE is disabled, so nothing would be logged: unset it, or set offline")
    folder = review.path.parent if review.path.name == FOLDER_NAME else review.path
    problem = prepare_environment(folder)
    is_offline = os.environ.get("WANDB_MODE") == "offline"
    name = facts.get("id") or _fresh_name(review)
    breaker = Breaker(Budget(10 * _PATIENCE_S), call_s=_PATIENCE_S)
    place: dict[str, Any] = {"project": facts.get("project") or os.environ.get("WANDB_PROJECT", "huggingface")}
    if facts.get("entity"):
        place["entity"] = facts["entity"]
    ids = {row.id for row in review.rows} | {row.id for row in review.explanations}
    if is_offline:
        known, in_table = _offline_ids(folder, name)
        if ids <= known | {row.id for row in review.explanations} and ids <= in_table:
            found = next(iter(_offline_folders(folder, name)))
            hint = wandb_hint({"mode": "offline", "folder": str(found)})
            return Replayed(tracker="wandb", run=name, logged=0, there=len(visits_of(review)), hint=hint)
    try:
        run = wandb.init(id=name, name=facts.get("name"), resume=None if is_offline else "allow", **place)
    except Exception as error:
        reason = problem or f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise TrackerError(
            f"W&B did not open the run {name} ({reason}); try again, or set WANDB_MODE=offline"
        ) from error
    try:
        if not is_offline:
            known, in_table = logged_ids(run, IDS_KEY), logged_ids(run, TABLE_IDS_KEY)
        there = sum(set(visit.ids) <= known for visit in visits_of(review))
        logged = log_review(run, review, pages, breaker, known=known, known_in_table=in_table)
        hint = wandb_hint(run_facts(run))
    finally:
        run.finish()
    if breaker.problems:
        raise TrackerError(f"W&B did not take all of it ({breaker.news()}); try again")
    return Replayed(tracker="wandb", run=name, logged=logged, there=there, hint=hint)


def _offline_folders(folder: Path, name: str) -> list[Path]:
    return sorted(Path(os.environ.get("WANDB_DIR", folder), "wandb").glob(f"offline-run-*-{name}"))


def _offline_ids(folder: Path, name: str) -> tuple[set[str], set[str]]:
    """Return the ids in an offline run's files: what did not reach the disk before a kill is not in them."""
    known: set[str] = set()
    in_table: set[str] = set()
    for place in _offline_folders(folder, name):
        for record in offline_records(place):
            item = record.get("history", {}).get("item", {}) if record.get("type") == "history" else {}
            known |= set(str(item.get(IDS_KEY) or "").split())
            in_table |= set(str(item.get(TABLE_IDS_KEY) or "").split())
    return known, in_table


def offline_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a W&B run's file, read by W&B's own tool; those that a crash cut off are missing."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _to_trackio(review: Review, pages: Pages, facts: dict[str, Any]) -> Replayed:
    try:
        import trackio  # noqa: F401

        from grpo_toolkit.reporting.trackers.trackio import log_review as log_to_trackio
    except ImportError as error:
        raise TrackerError("Trackio is not installed: pip install 'grpo-toolkit[trackio]'") from error
    project, name = facts.get("project") or "huggingface", facts.get("name") or _fresh_name(review)
    try:
        logged = log_to_trackio(review, pages, project=project, name=name)
    except Exception as error:
        raise TrackerError(f"Trackio did not take it ({type(error).__name__}: {error})") from error
    hint = f"  look: trackio show --project {project}"
    return Replayed(tracker="trackio", run=name, logged=logged, there=len(visits_of(review)) - logged, hint=hint)
