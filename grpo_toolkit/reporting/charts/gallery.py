"""The list of all charts: what each shows, and what has to be measured for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from grpo_toolkit.reporting.charts.arms import (
    distributions_caption,
    draw_bars,
    draw_distributions,
    draw_lengths,
    draw_positions,
    draw_trend,
)
from grpo_toolkit.reporting.charts.first_token import draw_first_token
from grpo_toolkit.reporting.charts.roofline import draw_roofline, roofline_caption
from grpo_toolkit.reporting.charts.style import as_png, styled
from grpo_toolkit.reporting.charts.sweeps import batches_caption, draw_batches, draw_images
from grpo_toolkit.reporting.charts.waterfall import draw_waterfall, waterfall_caption

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
        title, caption: what it is, and how to read it; a caption that depends on what is drawn is a function.
        needs: what is missing where it cannot be drawn.
        draw: from the rows to a figure, or None where they hold nothing for it.
    """

    name: str
    title: str
    caption: str | Callable[[Rows], str]
    needs: str
    draw: Callable[[Rows], Figure | None]

    def caption_of(self, rows: Rows) -> str:
        """Return how to read the chart that is drawn from these rows."""
        return self.caption if isinstance(self.caption, str) else self.caption(rows)


CHARTS: Final[tuple[Chart[Review], ...]] = (
    Chart(
        name="tpot",
        title="Time per output token",
        caption="Medians; the whiskers are quartiles over the measured requests.",
        needs="an answer of two tokens or more",
        draw=draw_bars,
    ),
    Chart(
        name="first_token",
        title="Until the first token",
        caption="Where the median TTFT goes, split as the phases of all measured requests are.",
        needs="phases, which an engine behind an address does not show",
        draw=draw_first_token,
    ),
    Chart(
        name="waterfall",
        title="From arm to arm",
        caption=waterfall_caption,
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
        caption=distributions_caption,
        needs="timelines",
        draw=draw_distributions,
    ),
    Chart(
        name="batches",
        title="Throughput against latency",
        caption=batches_caption,
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
        caption=roofline_caption,
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
