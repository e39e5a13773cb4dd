"""`trackers.json`: which runs this output folder's rows were logged to, so that a replay finds them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.review import Review

FILE_NAME: Final = "trackers.json"


def remember(folder: Path, tracker: str, facts: dict[str, Any], before: Review | None) -> None:
    """Note a run when training begins, and how many rows were there before it: those are not the run's."""
    found = read(folder)
    counts = [0, 0] if before is None else [len(before.rows), len(before.explanations)]
    found[tracker] = {**facts, "rows_before": counts}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest run per tracker; empty where nothing was noted or the file is cut off."""
    try:
        found = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rows_of(review: Review, facts: dict[str, Any]) -> Review:
    """The review with the rows of one run alone: those measured since it began."""
    rows, explanations = facts.get("rows_before") or (0, 0)
    return replace(review, rows=review.rows[rows:], explanations=review.explanations[explanations:])
