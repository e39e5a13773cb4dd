"""The list of all charts: what each shows, and what has to be measured for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from grpo_toolkit.reporting.charts.arms import (
    draw_bars,
    draw_distributions,
    draw_lengths,
    draw_positions,
    draw_trend,
)
from grpo_toolkit.reporting.charts.causes import draw_roofline, draw_waterfall
from grpo_toolkit.reporting.charts.style import as_png, styled
from grpo_toolkit.reporting.charts.sweeps import draw_batches, draw_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review

Rows = TypeVar("Rows")
"""The rows that a chart is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Chart(Generic[Rows]):
    """A chart, its words and the function that draws it.

    Attributes:
        name: of its file and its key in trackers.
        title, caption: what it is, and how to read it.
        needs: what is missing where it cannot be drawn.
        draw: from the rows to a figure, or None where they hold nothing for it.
    """

    name: str
    title: str
    caption: str
    needs: str
    draw: Callable[[Rows], Figure | None]


CHARTS: Final[tuple[Chart[Review], ...]] = (
    Chart(
        name="tpot",
        title="Time per output token",
        caption="Medians; the whiskers are quartiles over the measured requests.",
        needs="an answer of two tokens or more",
        draw=draw_bars,
    ),
    Chart(
        name="waterfall",
        title="From base to checkpoint to export",
        caption="What adds time (red) and what takes it away (teal). The bars add up; hatched is unexplained.",
        needs="two of base, checkpoint and export in one session, or grpo-toolkit explain",
        draw=draw_waterfall,
    ),
    Chart(
        name="positions",
        title="Along the answer",
        caption="Time between tokens, median and quartiles. Flat with a KV cache, climbing without one.",
        needs="timelines of two tokens or more",
        draw=draw_positions,
    ),
    Chart(
        name="distributions",
        title="Spread over requests",
        caption="A dot a measured request; the box is median and quartiles. Without the arm whose cache is off.",
        needs="timelines",
        draw=draw_distributions,
    ),
    Chart(
        name="batches",
        title="Throughput against latency",
        caption="A point a batch size. Up and left is better; the dashed line is peak memory.",
        needs="rows of more than one batch size",
        draw=draw_batches,
    ),
    Chart(
        name="images",
        title="What an image costs before the first token",
        caption="TTFT by the image's number of tokens, split into its phases.",
        needs="rows of more than one number of image tokens",
        draw=draw_images,
    ),
    Chart(
        name="lengths",
        title="How long answers are",
        caption="Longer answers cost time although every token is as fast. Left is shorter.",
        needs="a natural workload, ended by the model itself",
        draw=draw_lengths,
    ),
    Chart(
        name="roofline",
        title="What the hardware allows",
        caption="A decode step must read weights and KV cache once: that is the floor. MBU is its share of TPOT.",
        needs="a measured bandwidth",
        draw=draw_roofline,
    ),
    Chart(
        name="trend",
        title="Over the training",
        caption="Time per output token at every measured step.",
        needs="measurements at two steps or more",
        draw=draw_trend,
    ),
)


def write_pictures(review: Review, folder: Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Write PNGs of the charts that can be drawn (`names`: these alone); returns them by name."""
    return pictures_of([chart for chart in CHARTS if names is None or chart.name in names], review, folder)


def pictures_of(charts: Iterable[Chart[Rows]], rows: Rows, folder: Path) -> dict[str, Path]:
    """Write PNGs of those of some charts that can be drawn; returns them by name."""
    written: dict[str, Path] = {}
    with styled():
        for chart in charts:
            figure = chart.draw(rows)
            if figure is not None:
                written[chart.name] = as_png(figure, folder / f"{chart.name}.png")
    return written
