"""The part of the report that is about a training's steps, and the page of a run that has steps alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import InputError
from grpo_toolkit.reporting.charts.step_gallery import STEP_CHARTS
from grpo_toolkit.reporting.charts.style import as_svg, styled
from grpo_toolkit.reporting.terminal.step_time import cause_title, phase_title
from grpo_toolkit.step_time.explain import explain_steps
from grpo_toolkit.step_time.store import StepReview, find_step_file, load_step_review

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.step_time.rows import StepExplanation


def steps_beside(path: Path) -> StepReview | None:
    """Return the steps of the run that a folder of latency rows belongs to; None where there are none."""
    return load_step_review(path) if find_step_file(path) is not None else None


def explained(review: StepReview) -> StepExplanation | None:
    """Return the newest explanation; of a training that was killed before the first, its steps without causes."""
    newest = review.explanations[-1] if review.explanations else None
    if newest is not None and review.steps and newest.session == review.steps[-1].session:
        return newest
    return explain_steps(review.steps, ranks=review.ranks)


def step_section(review: StepReview) -> dict[str, Any] | None:
    """Return what the template shows of a run's steps; None where no step has phases."""
    row = explained(review)
    if row is None:
        return None
    charts, missing = [], []
    with styled():
        for chart in STEP_CHARTS:
            figure = chart.draw(review)
            if figure is None:
                missing.append(chart)
            else:
                charts.append(
                    {
                        "about": chart,
                        "caption": chart.caption_of(review),
                        "svg": as_svg(figure, name=chart.name, title=chart.title),
                    }
                )
    return {
        "row": row,
        "charts": charts,
        "missing": missing,
        "phases": [_line(row, name) for name in row.phases_s],
        "causes": [(cause_title(found.cause), found) for found in row.causes],
        "count": len(review.steps),
    }


def _line(row: StepExplanation, name: str) -> dict[str, Any]:
    floors = row.floors_s or {}
    floor = sum(seconds for part, seconds in floors.items() if part.partition("/")[0] == name)
    return {
        "name": phase_title(name),
        "seconds": row.phases_s[name],
        "share": row.phases_s[name] / row.wall_s if row.wall_s else 0.0,
        "floor": floor or None,
    }


def compared_steps(one: StepReview, other: StepReview) -> list[dict[str, Any]]:
    """Return a line a phase for two runs: the one that got slower by most first, the whole step at the end.

    Raises:
        InputError: one of them has no steps with phases.
    """
    rows = [explained(one), explained(other)]
    for review, row in zip((one, other), rows, strict=True):
        if row is None:
            raise InputError(f"{review.path}: no step in it has phases to compare")
    before, after = (row.phases_s for row in rows if row is not None)
    names = sorted({*before, *after}, key=lambda name: before.get(name, 0.0) - after.get(name, 0.0))
    lines = [_change(phase_title(name), before.get(name, 0.0), after.get(name, 0.0)) for name in names]
    return [*lines, _change("step", sum(before.values()), sum(after.values()))]


def _change(name: str, old: float, new: float) -> dict[str, Any]:
    return {"name": name, "old": old, "new": new, "ratio": new / old if old > 0 else None, "difference": new - old}
