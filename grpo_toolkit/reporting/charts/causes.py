"""Charts of where time goes and why: the waterfall from arm to arm, and what physics allows."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from grpo_toolkit.latency.rows.row import METRICS
from grpo_toolkit.reporting.charts.style import (
    LIGHT,
    colours_of,
    horizontal_only,
    label_of,
    legend_below,
    milliseconds,
    new_figure,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow


_LINE_LETTERS: Final = 70
_LABEL_LETTERS: Final = 11
"""The number of letters of a bar's name that stand side by side under all bars, and under one of many."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a waterfall, in seconds: a level stands on the ground, a change hangs between two heights."""

    label: str
    kind: Literal["level", "change", "unexplained"]
    value_s: float
    low_s: float | None = None
    high_s: float | None = None
    arm: str = ""


def waterfall_bars(review: Review) -> tuple[str, list[Bar]]:
    """Return the metric's name and its bars, from base to checkpoint to export: levels, and the changes between.

    Between two arms stand the causes of their newest explanation where there is one, otherwise the change until the
    first token and the change after it, from the medians. The bars always add up.
    """
    arms = [row for row in review.arms if row.arm in ("base", "checkpoint", "export")]
    steps = [_explanation(review, one.arm, other.arm) for one, other in zip(arms, arms[1:], strict=False)]
    chain = [step for step in steps if step is not None]
    names = {row.arm for row in arms}
    ours = [e for e in review.explanations if {arm_named(review, e.base), arm_named(review, e.trained)} <= names]
    if not chain or len(chain) < len(steps) or len({step.metric for step in chain}) > 1:
        chain = ours[-1:]
    if not chain and len(arms) > 1:
        return "e2e_s", _from_medians(arms)
    chain = chain or list(review.explanations[-1:])
    if not chain:
        return "e2e_s", []
    first = arm_named(review, chain[0].base)
    bars = [Bar(label=label_of(first), kind="level", value_s=chain[0].base_s, arm=first)]
    for explanation in chain:
        bars += _changes(explanation)
        arm = arm_named(review, explanation.trained)
        bars.append(Bar(label=label_of(arm), kind="level", value_s=explanation.trained_s, arm=arm))
    return chain[0].metric, bars


def _explanation(review: Review, base: str, trained: str) -> ExplanationRow | None:
    ends = base, trained
    found = (
        e for e in reversed(review.explanations) if (arm_named(review, e.base), arm_named(review, e.trained)) == ends
    )
    return next(found, None)


def arm_named(review: Review, name: str) -> str:
    """Return the arm that an explanation means, which may name its folder; else the folder's name."""
    arms = {row.path: row.arm for row in reversed(review.arms)} | {row.arm: row.arm for row in review.arms}
    return arms.get(name, Path(name).name)


def _changes(explanation: ExplanationRow) -> list[Bar]:
    effects = explanation.effects or explanation.split
    return [
        Bar(
            label=effect.cause.removesuffix("_s").replace("_", " ").replace("-", " "),
            kind="unexplained" if effect.layer == "unexplained" else "change",
            value_s=effect.effect_s,
            low_s=effect.low_s,
            high_s=effect.high_s,
        )
        for effect in effects
        if effect.effect_s or effect.layer == "unexplained"
    ]


def _from_medians(arms: Sequence[LatencyRow]) -> list[Bar]:
    bars: list[Bar] = []
    for before, row in zip([None, *arms], arms, strict=False):
        assert row.e2e_s is not None
        if before is not None:
            assert before.e2e_s is not None
            whole = row.e2e_s.median - before.e2e_s.median
            first = 0.0
            if row.ttft_s is not None and before.ttft_s is not None:
                first = row.ttft_s.median - before.ttft_s.median
                bars.append(Bar(label="first token", kind="change", value_s=first))
            bars.append(Bar(label="later tokens", kind="change", value_s=whole - first))
        bars.append(Bar(label=label_of(row.arm), kind="level", value_s=row.e2e_s.median, arm=row.arm))
    return bars


def draw_waterfall(review: Review) -> Figure | None:
    """Draw levels and the changes between them; whiskers are 95% intervals, hatched is what stays unexplained."""
    metric, bars = waterfall_bars(review)
    if not bars:
        return None
    figure = new_figure(3.3)
    axes = figure.subplots()
    colours = _level_colours([bar.arm for bar in bars if bar.kind == "level"])
    height = 0.0
    for place, bar in enumerate(bars):
        start = 0.0 if bar.kind == "level" else height
        end = bar.value_s if bar.kind == "level" else height + bar.value_s
        _draw_bar(axes, place, bar, start * 1e3, end * 1e3, colours)
        if place + 1 < len(bars):
            axes.plot([place - 0.34, place + 1.34], [end * 1e3] * 2, color=LIGHT["soft"], linewidth=0.7, zorder=1)
        height = end
    slant = len(bars) > 8
    letters = _LABEL_LETTERS if slant else max(_LABEL_LETTERS, _LINE_LETTERS // len(bars))
    labels = [textwrap.fill(bar.label, letters) for bar in bars]
    axes.set_xticks(range(len(bars)), labels, rotation=35 if slant else 0, ha="right" if slant else "center")
    axes.tick_params(axis="x", labelcolor=LIGHT["ink"], labelsize=8)
    axes.set_ylabel(f"{METRICS.get(metric, metric)} (ms)")
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_ylim(min(0.0, low) * 1.1, high * 1.12)
    horizontal_only(axes)
    return figure


def _level_colours(arms: Sequence[str]) -> dict[str, str]:
    """Return the levels' colours; folders that are no arm get those of base and checkpoint, as others mean changes."""
    colours = colours_of(arms)
    strangers = [arm for arm in arms if arm not in LIGHT]
    if strangers and len(strangers) == len(arms):
        colours |= dict.fromkeys(arms, LIGHT["checkpoint"]) | {arms[0]: LIGHT["base"]}
    return colours


def _draw_bar(axes: Axes, place: int, bar: Bar, start: float, end: float, colours: dict[str, str]) -> None:
    if bar.kind == "level":
        colour = colours[bar.arm]
    else:
        colour = LIGHT["off"] if end > start else LIGHT["other2"]
    if bar.kind == "unexplained":
        axes.bar(place, end - start, bottom=start, width=0.68, color="none", edgecolor=LIGHT["soft"], hatch="////")
    else:
        axes.bar(place, end - start, bottom=start, width=0.68, color=colour, zorder=2)
    top = max(start, end)
    if bar.low_s is not None and bar.high_s is not None:
        ends = (start + bar.low_s * 1e3, start + bar.high_s * 1e3)
        axes.plot([place, place], ends, color=LIGHT["ink"], linewidth=1, zorder=3)
        top = max(top, *ends)
    sign = "" if bar.kind == "level" else "+" if bar.value_s >= 0 else "\N{MINUS SIGN}"
    text = f"{sign}{milliseconds(abs(bar.value_s))}"
    weight = "bold" if bar.kind == "level" else "normal"
    axes.annotate(text, (place, top), xytext=(0, 3), textcoords="offset points", ha="center", weight=weight)


def draw_roofline(review: Review) -> Figure | None:
    """Draw, left, the FLOP/s that the hardware allows, decode and prefill as measured; right, TPOT over its floor."""
    rows = [row for row in review.arms if row.roofline is not None and row.tpot_s is not None]
    if not rows:
        return None
    roofs = [row for row in rows if row.roofline is not None and row.roofline.peak_flops_per_s]
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
    for x, y, marker, arm in points:
        axes.plot(x, y, marker, color=colours[arm], markersize=6.5)
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
