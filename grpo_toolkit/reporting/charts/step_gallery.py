"""The list of the charts of a training's steps: what each shows, and what has to be there for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.reporting.charts.steps import draw_phases, draw_ranks, draw_spread, draw_step_waterfall
from grpo_toolkit.reporting.charts.style import as_png, styled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

    from grpo_toolkit.step_time.store import StepReview


@dataclass(frozen=True, kw_only=True)
class StepChart:
    """A chart of steps, its words and the function that draws it; the same fields as those of `gallery.Chart`."""

    name: str
    title: str
    caption: str
    needs: str
    draw: Callable[[StepReview], Figure | None]


STEP_CHARTS: Final = (
    StepChart(
        name="step_phases",
        title="Where a step's time goes",
        caption="A bar a step; its phases add up to its time. The dashed line is what physics asks for.",
        needs="steps with phases",
        draw=draw_phases,
    ),
    StepChart(
        name="step_waterfall",
        title="From this step to its floor",
        caption="What each cause's cure is predicted to take off the step; hatched is in no cause.",
        needs="a step that was looked at closely, and a device that was measured",
        draw=draw_step_waterfall,
    ),
    StepChart(
        name="step_spread",
        title="Spread over steps",
        caption="Median and quartiles of each phase, without the first step and those that were looked at closely.",
        needs="three steps or more",
        draw=draw_spread,
    ),
    StepChart(
        name="step_ranks",
        title="The processes side by side",
        caption="The mean step of each process. Where one is busy for longer, the others wait for it.",
        needs="more than one process",
        draw=draw_ranks,
    ),
)


def write_step_pictures(review: StepReview, folder: Path) -> dict[str, Path]:
    """Write PNGs of the charts that can be drawn; returns them by name."""
    written: dict[str, Path] = {}
    with styled():
        for chart in STEP_CHARTS:
            figure = chart.draw(review)
            if figure is not None:
                written[chart.name] = as_png(figure, folder / f"{chart.name}.png")
    return written
