"""The file `trackers.json`: the runs that an output folder's rows were logged to, so that a replay finds them.

Per tracker the runs in order, each with how many rows were in the folder when it began: those from there to the next
run's beginning are its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.review import Review

FILE_NAME: Final = "trackers.json"


def remember(folder: Path, tracker: str, facts: dict[str, Any], before: Review | None) -> None:
    """Note a run when training begins; one that goes on with the newest run of before is that run."""
    found = read(folder)
    runs = found.setdefault(tracker, [])
    if runs and _identity(runs[-1]) == _identity(facts):
        facts = {**facts, "rows_before": runs.pop()["rows_before"]}
    else:
        counts = [0, 0] if before is None else [len(before.rows), len(before.explanations)]
        facts = {**facts, "rows_before": counts}
    runs.append(facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def remember_session(folder: Path, tracker: str, facts: dict[str, Any], session: str) -> None:
    """Note that a session's steps went into a run; one that goes on with the newest run of before is that run."""
    found = read(folder)
    runs = found.setdefault(tracker, [])
    sessions = [session]
    if runs and _identity(runs[-1]) == _identity(facts):
        sessions = [*runs.pop().get("sessions", []), session]
    runs.append({**facts, "sessions": sessions})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _identity(facts: dict[str, Any]) -> tuple[Any, ...]:
    return facts.get("entity"), facts.get("project"), facts.get("id") or facts.get("name")


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the runs per tracker; empty where nothing was noted or the file is cut off."""
    try:
        found = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def runs_of(review: Review, tracker: str) -> list[tuple[dict[str, Any], Review]]:
    """Return each run with its own rows, oldest first; one without facts for all rows where none was noted."""
    runs = read(review.path).get(tracker) or [{}]
    starts = [facts.get("rows_before") or (0, 0) for facts in runs]
    ends: list[Any] = [*starts[1:], (None, None)]
    return [
        (facts, replace(review, rows=review.rows[a:b], explanations=review.explanations[c:d]))
        for facts, (a, c), (b, d) in zip(runs, starts, ends, strict=True)
    ]
