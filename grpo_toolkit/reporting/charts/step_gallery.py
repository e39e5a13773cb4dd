"""The list of the charts of a training's steps: what each shows, and what has to be there for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.reporting.charts.gallery import Chart, pictures_of
from grpo_toolkit.reporting.charts.steps import draw_phases, draw_ranks, draw_spread, draw_step_waterfall

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.step_time.store import StepReview


STEP_CHARTS: Final[tuple[Chart[StepReview], ...]] = (
    Chart(
        name="step_phases",
        title="Where a step's time goes",
        caption="A bar a step; its phases add up to its time. The dashed line is what physics asks for.",
        needs="steps with phases",
        draw=draw_phases,
    ),
    Chart(
        name="step_waterfall",
        title="From this step to its floor",
        caption="What each cause's cure is predicted to take off the step; hatched is in no cause.",
        needs="a step that was looked at closely, and a device that was measured",
        draw=draw_step_waterfall,
    ),
    Chart(
        name="step_spread",
        title="Spread over steps",
        caption="Median and quartiles of each phase, without the first step and those that were looked at closely.",
        needs="three steps or more",
        draw=draw_spread,
    ),
    Chart(
        name="step_ranks",
        title="The processes side by side",
        caption="The mean step of each process. Where one is busy for longer, the others wait for it.",
        needs="more than one process",
        draw=draw_ranks,
    ),
)


def write_step_pictures(review: StepReview, folder: Path) -> dict[str, Path]:
    """Write PNGs of the charts that can be drawn; returns them by name."""
    return pictures_of(STEP_CHARTS, review, folder)
