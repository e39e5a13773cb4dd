"""Latency in Trackio: scalars, table, pictures and report, in the run that the trainer logged into.

The trainer's callback finishes its run in `on_train_end`, before ours is asked (transformers 5.23): the run is opened
again under the same name, logged into and finished. Trackio has no metric definitions, no summary and no plot presets.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.rows.review import visits_of
from grpo_toolkit.reporting.trackers.metrics import (
    IDS_KEY,
    REPORT_KEY,
    STEP_METRIC,
    TABLE_KEY,
    joined,
    scalars,
    table,
)

if TYPE_CHECKING:
    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.reporting.report.page import Pages


def open_run() -> dict[str, Any] | None:
    """Return project and name of the run that this process logs into, or None; never imports Trackio."""
    if "trackio" not in sys.modules:
        return None
    from trackio import context_vars

    run = context_vars.current_run.get()
    if run is None:
        return None
    return {"project": context_vars.current_project.get(), "name": run.name}


def log_review(review: Review, pages: Pages, *, project: str, name: str) -> int:
    """Log what the run does not have yet, in one go; returns how many exports that was.

    Raises:
        ImportError: Trackio is not installed.
    """
    import trackio

    known = logged_ids(project, name)
    visits = [visit for visit in visits_of(review) if not set(visit.ids) <= known]
    if not visits:
        return 0
    trackio.init(project=project, name=name, resume="allow", embed=False)
    try:
        for visit in visits:
            values = scalars(visit, known)
            known |= set(visit.ids)
            trackio.log({**values, IDS_KEY: joined(known), STEP_METRIC: visit.step})
        media: dict[str, Any] = {
            f"latency/charts/{key}": trackio.Image(str(path)) for key, path in pages.pictures.items()
        }
        columns, data = table(review.rows)
        media[TABLE_KEY] = trackio.Table(columns=columns, data=data)
        if pages.report is not None:
            media[REPORT_KEY] = trackio.Html(pages.report.read_text(encoding="utf-8"))
        trackio.log({**media, STEP_METRIC: visits[-1].step})
    finally:
        trackio.finish()
    return len(visits)


def logged_ids(project: str, name: str) -> set[str]:
    """Return the ids of the rows that a local run has."""
    from trackio.sqlite_storage import SQLiteStorage

    if project not in SQLiteStorage.get_projects() or name not in SQLiteStorage.get_runs(project):
        return set()
    found: set[str] = set()
    for line in SQLiteStorage.get_logs(project, name):
        found |= set(str(line.get(IDS_KEY) or "").split())
    return found
