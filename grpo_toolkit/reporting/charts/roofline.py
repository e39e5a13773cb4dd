"""The chart of what physics allows: the roofline, and each arm's time per token over its floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.reporting.charts.style import LIGHT, colours_of, label_of, legend_below, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow


def roofline_caption(review: Review) -> str:
    """Return how to read the roofline, or the floors alone where the FLOP/s of the device are not known."""
    floor = "A decode step must read weights and KV cache once: that is the floor. MBU is its share of TPOT."
    return f"Left, the work that the hardware allows. {floor}" if _with_roof(review) else floor


def _with_roof(review: Review) -> list[LatencyRow]:
    rows = [row for row in review.arms if row.tpot_s is not None]
    return [row for row in rows if row.roofline is not None and row.roofline.peak_flops_per_s]


def draw_roofline(review: Review) -> Figure | None:
    """Draw, left, the FLOP/s that the hardware allows, decode and prefill as measured; right, TPOT over its floor."""
    rows = [row for row in review.arms if row.roofline is not None and row.tpot_s is not None]
    if not rows:
        return None
    roofs = _with_roof(review)
    figure = new_figure(3.2 if roofs else 0.9 + 0.45 * len(rows))
    colours = colours_of([row.arm for row in rows])
    if not roofs:
        _draw_floors(figure.subplots(), rows, colours)
        return figure
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_roof(left, roofs, colours)
    _draw_floors(right, rows, colours)
    right.set_yticks([])
    handles = [left.plot([], [], "s", color=colours[row.arm])[0] for row in rows]
    legend_below(figure, handles, [label_of(row.arm) for row in rows])
    return figure


def _draw_roof(axes: Axes, rows: Sequence[LatencyRow], colours: dict[str, str]) -> None:
    first = rows[0].roofline
    assert first is not None
    assert first.peak_flops_per_s is not None
    points: list[tuple[float, float, str, str]] = []
    for row in rows:
        roof = row.roofline
        assert roof is not None
        if row.parameters and row.tpot_s is not None:
            flops = 2.0 * row.parameters * row.workload.batch_size
            points.append((flops / roof.bytes_per_step, flops / row.tpot_s.median, "o", row.arm))
        if roof.prefill_flops and row.phases.prefill_s is not None and row.phases.prefill_s.median > 0:
            speed = roof.prefill_flops / row.phases.prefill_s.median
            points.append((roof.prefill_flops / roof.bytes_per_step, speed, "^", row.arm))
    ridge = first.peak_flops_per_s / first.bandwidth_bytes_per_s
    low = min([ridge, *(x for x, *_ in points)]) / 4
    high = max([ridge, *(x for x, *_ in points)]) * 4
    roof_line = [first.bandwidth_bytes_per_s * low, first.peak_flops_per_s, first.peak_flops_per_s]
    axes.plot([low, ridge, high], roof_line, color=LIGHT["soft"], linewidth=1.6)
    arms = [row.arm for row in rows]
    for x, y, marker, arm in points:  # the first are larger: arms that are as fast are both seen
        axes.plot(x, y, marker, color=colours[arm], markersize=6.0 + 1.6 * (len(arms) - 1 - arms.index(arm)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte (dot: decode,\ntriangle: prefill)", fontsize=8)
    axes.set_ylabel("FLOP/s")


def _draw_floors(axes: Axes, rows: Sequence[LatencyRow], colours: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        assert row.roofline is not None
        assert row.tpot_s is not None
        floor, measured = row.roofline.floor_tpot_s * 1e3, row.tpot_s.median * 1e3
        axes.barh(place, measured, color=colours[row.arm], alpha=0.3, height=0.6)
        axes.barh(place, min(floor, measured), color=colours[row.arm], height=0.6)
        share = row.roofline.mbu if row.roofline.mbu is not None else floor / measured
        axes.annotate(
            f"{share * 100:.0f}%",
            (measured, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
        )
    axes.set_yticks(range(len(rows)), [label_of(row.arm) for row in rows])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel("TPOT (ms); dark: the floor,\n%: its share, MBU", fontsize=8)
