"""Charts of what moves latency: the batch size, and the size of the image."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal

from grpo_toolkit.latency.explain.exact_split import PHASES, PREFILL
from grpo_toolkit.reporting.charts.style import (
    LIGHT,
    PHASE_COLOURS,
    colours_of,
    horizontal_only,
    label_of,
    legend_below,
    line_look,
    lying_on,
    milliseconds,
    new_figure,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow


def batches_caption(review: Review) -> str:
    """Return how to read throughput against latency, and the memory where it was measured."""
    memory = "; the dotted line is peak memory" if any(row.memory.peak_bytes for row in review.batches) else ""
    return f"A point a batch size. Up and left is better{memory}."


def draw_batches(review: Review) -> Figure | None:
    """Draw tokens/s against TPOT, a point a batch size; peak memory on the second axis, dotted."""
    rows = review.batches
    measured = [row for row in rows if row.tpot_s is not None and row.output_tokens_per_s is not None]
    if len({row.workload.batch_size for row in measured}) < 2:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    colours = colours_of([row.arm for row in rows])
    memory = axes.twinx() if any(row.memory.peak_bytes for row in measured) else None
    groups = {arm: list(group) for arm, group in groupby(measured, key=lambda row: row.arm)}
    curves = {arm: _curve(points) for arm, points in groups.items()}
    most = [max(max(curve[axis]) for curve in curves.values()) for axis in (0, 1)]
    beneath = lying_on(
        {arm: [at / top for part, top in zip(c, most, strict=True) for at in part] for arm, c in curves.items()}, 1.0
    )
    for arm, points in groups.items():
        x, y = curves[arm]
        look = line_look(arm, beneath)
        look["label"] += _out_of_memory(rows, arm)
        axes.plot(x, y, "o-", color=colours[arm], markersize=4.5, **look)
        above = arm != rows[0].arm  # the first arm's labels below its points, so that two close lines stay readable
        for row, x_at, y_at in zip(points, x, y, strict=True):
            text, offset = str(row.workload.batch_size), (-5, 3) if above else (5, -9)
            side: Literal["left", "right"] = "right" if above else "left"
            axes.annotate(text, (x_at, y_at), xytext=offset, textcoords="offset points", ha=side, fontsize=8)
        if memory is not None:
            found = [
                (at, row.memory.peak_bytes / 1e9) for at, row in zip(x, points, strict=True) if row.memory.peak_bytes
            ]
            memory.plot(*zip(*found, strict=True), ":", color=colours[arm], linewidth=1.4)
    axes.set_xlabel("time per output token (ms); labels: batch size")
    axes.set_ylabel("output tokens/s (solid)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    if memory is not None:
        memory.set_ylabel("peak GB (dotted)")
        memory.set_ylim(bottom=0)
        memory.spines["right"].set_visible(False)
        memory.grid(visible=False)
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles, labels, columns=2)
    return figure


def _curve(rows: Sequence[LatencyRow]) -> tuple[list[float], list[float]]:
    x = [row.tpot_s.median * 1e3 for row in rows if row.tpot_s is not None]
    return x, [row.output_tokens_per_s.median for row in rows if row.output_tokens_per_s is not None]


def _out_of_memory(rows: Sequence[LatencyRow], arm: str) -> str:
    failed = [row.workload.batch_size for row in rows if row.arm == arm and row.error is not None]
    return f" (no more at batch {min(failed)})" if failed else ""


def draw_images(review: Review) -> Figure | None:
    """Draw TTFT by image tokens: the export's phases stacked, every arm's TTFT as a dot."""
    rows = [row for row in review.images if row.ttft_s is not None]
    counts = sorted({row.workload.image_tokens for row in rows if row.workload.image_tokens is not None})
    if len(counts) < 2:
        return None
    arms = list(dict.fromkeys(row.arm for row in rows))
    shown = "export" if "export" in arms else arms[0]
    figure = new_figure(3.4)
    axes = figure.subplots()
    heights = [0.0] * len(counts)
    chosen = {row.workload.image_tokens: row for row in rows if row.arm == shown}
    for phase, name in {**PHASES, "prefill_s": PREFILL}.items():
        spans = [_phase(chosen.get(count), phase) for count in counts]
        if any(spans):
            axes.bar(range(len(counts)), spans, bottom=heights, width=0.62, color=PHASE_COLOURS[phase], label=name)
            heights = [low + span for low, span in zip(heights, spans, strict=True)]
    colours = colours_of(arms)
    for place, arm in enumerate(arms):
        aside = 0.14 * (place - (len(arms) - 1) / 2)  # side by side: arms that took as long are both seen
        points = [
            (counts.index(row.workload.image_tokens) + aside, row.ttft_s.median * 1e3)
            for row in rows
            if row.arm == arm and row.workload.image_tokens is not None and row.ttft_s is not None
        ]
        axes.plot(
            *zip(*points, strict=True), "o", color=colours[arm], markersize=6, markeredgecolor=LIGHT["page"],
            label=f"TTFT, {label_of(arm)}",
        )  # fmt: skip
        if arm == shown:
            for at, value in points:
                count = counts[round(at - aside)]
                top = max(r.ttft_s.median for r in rows if r.workload.image_tokens == count and r.ttft_s) * 1e3
                axes.annotate(
                    milliseconds(value / 1e3),
                    (at - aside, top),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                )
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel(f"image tokens (bars: phases of {label_of(shown)})")
    axes.set_ylabel("time to first token (ms)")
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)
    horizontal_only(axes)
    legend_below(figure, columns=3)
    return figure


def _phase(row: LatencyRow | None, phase: str) -> float:
    summary = None if row is None else getattr(row.phases, phase)
    return 0.0 if summary is None else float(summary.median * 1e3)
