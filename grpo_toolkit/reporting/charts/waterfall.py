"""The waterfall from arm to arm: levels, and what changes between them.

A change whose interval includes zero is no change that was seen: such ones, and what is left over, are one hatched
piece between two levels, without a figure. So the bars add up, and none is drawn that the next run may turn round.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from grpo_toolkit.latency.bench.statistics import paired_difference
from grpo_toolkit.latency.rows.row import METRICS
from grpo_toolkit.reporting.charts.style import (
    LIGHT,
    colours_of,
    horizontal_only,
    label_of,
    milliseconds,
    new_figure,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow, Timeline


NOISE: Final = "within noise"
FEW_ROUNDS: Final = "too few rounds"
_LINE_LETTERS: Final = 70
_LABEL_LETTERS: Final = 11
"""The number of letters of a bar's name that stand side by side under all bars, and under one of many."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a waterfall, in seconds: a level stands on the ground, the others hang between two heights.

    Of `noise` no figure is shown: it is what no interval tells from nothing.
    """

    label: str
    kind: Literal["level", "change", "unexplained", "noise"]
    value_s: float
    low_s: float | None = None
    high_s: float | None = None
    arm: str = ""


def waterfall_bars(review: Review) -> tuple[str, list[Bar]]:
    """Return the metric's name and its bars, from base to checkpoint to export: levels, and the changes between.

    Between two arms stand the causes of their newest explanation where there is one, otherwise the change until the
    first token and the change after it, paired by round. The bars always add up.
    """
    arms = [row for row in review.arms if row.arm in ("base", "checkpoint", "export")]
    steps = [_explanation(review, one.arm, other.arm) for one, other in zip(arms, arms[1:], strict=False)]
    chain = [step for step in steps if step is not None]
    names = {row.arm for row in arms}
    ours = [e for e in review.explanations if {arm_named(review, e.base), arm_named(review, e.trained)} <= names]
    if not chain or len(chain) < len(steps) or len({step.metric for step in chain}) > 1:
        chain = ours[-1:]
    if not chain and len(arms) > 1:
        return "e2e_s", _from_rounds(arms)
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
    bars = [
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
    if not explanation.effects and _includes_zero(explanation.low_s, explanation.high_s):
        bars = []  # an exact split of a difference that is none
    return _seen(bars, explanation.trained_s - explanation.base_s)


def _seen(bars: Sequence[Bar], whole_s: float, rest: str = NOISE) -> list[Bar]:
    """Return the changes that their intervals tell from nothing; the others become what is left of the whole."""
    seen = [bar for bar in bars if not _includes_zero(bar.low_s, bar.high_s)]
    left_s = whole_s - sum(bar.value_s for bar in seen)
    if len(seen) == len(bars) and abs(left_s) <= 1e-6 * abs(whole_s):
        return seen
    changes = [bar for bar in seen if bar.kind == "change"]
    label = rest if len(changes) == len(seen) else f"unexplained, {rest}"
    return [*changes, Bar(label=label, kind="noise", value_s=whole_s - sum(bar.value_s for bar in changes))]


def _includes_zero(low_s: float | None, high_s: float | None) -> bool:
    return low_s is not None and high_s is not None and low_s <= 0 <= high_s


def _from_rounds(arms: Sequence[LatencyRow]) -> list[Bar]:
    bars: list[Bar] = []
    for before, row in zip([None, *arms], arms, strict=False):
        assert row.e2e_s is not None
        if before is not None:
            assert before.e2e_s is not None
            found = _paired_changes(before, row)
            bars += _seen(found or [], row.e2e_s.median - before.e2e_s.median, NOISE if found else FEW_ROUNDS)
        bars.append(Bar(label=label_of(row.arm), kind="level", value_s=row.e2e_s.median, arm=row.arm))
    return bars


def _paired_changes(before: LatencyRow, row: LatencyRow) -> list[Bar] | None:
    """Return the change until the first token and the change after it; None where too few rounds were paired."""
    both = list(zip(row.timelines, before.timelines, strict=False))
    if len(row.timelines) != len(before.timelines) or not both:
        return None
    found = []
    parts: dict[str, Callable[[Timeline], float]] = {
        "first token": lambda timeline: timeline.ttft_s,
        "later tokens": lambda timeline: timeline.e2e_s - timeline.ttft_s,
    }
    for label, part in parts.items():
        middle, low, high = paired_difference([part(one) for one, _ in both], [part(other) for _, other in both])
        if low is None:
            return None
        found.append(Bar(label=label, kind="change", value_s=middle, low_s=low, high_s=high))
    return found


def waterfall_caption(review: Review) -> str:
    """Return how to read the waterfall that is drawn: its arms, its time, and what each look in it means."""
    metric, bars = waterfall_bars(review)
    kinds = {bar.kind for bar in bars}
    time = METRICS.get(metric, metric)
    said = [f"{' → '.join(bar.label for bar in bars if bar.kind == 'level')}, {time}."]
    directions = {bar.value_s > 0 for bar in bars if bar.kind == "change"}
    words = {True: "red adds time", False: "teal takes it away"}
    if directions:
        whiskers = any(bar.low_s is not None for bar in bars)
        looks = ", ".join(words[up] for up in (True, False) if up in directions)
        said.append(f"{looks[:1].upper()}{looks[1:]}{'; whiskers are 95% intervals' if whiskers else ''}.")
    if "unexplained" in kinds:
        said.append("Hatched is unexplained.")
    if "noise" in kinds:
        few = any(bar.label == FEW_ROUNDS for bar in bars)
        said.append(
            "Hatched: too few rounds for an interval." if few else "Hatched: no interval tells it from nothing."
        )
    return " ".join(said)


def draw_waterfall(review: Review) -> Figure | None:
    """Draw levels and the changes between them; whiskers are 95% intervals, hatched is noise or unexplained."""
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
    if bar.kind in ("unexplained", "noise"):
        axes.bar(place, end - start, bottom=start, width=0.68, color="none", edgecolor=LIGHT["soft"], hatch="////")
    else:
        axes.bar(place, end - start, bottom=start, width=0.68, color=colour, zorder=2)
    top = max(start, end)
    if bar.low_s is not None and bar.high_s is not None:
        ends = (start + bar.low_s * 1e3, start + bar.high_s * 1e3)
        axes.plot([place, place], ends, color=LIGHT["ink"], linewidth=1, zorder=3)
        top = max(top, *ends)
    if bar.kind == "noise":
        return
    sign = "" if bar.kind == "level" else "+" if bar.value_s >= 0 else "\N{MINUS SIGN}"
    text = f"{sign}{milliseconds(abs(bar.value_s))}"
    weight = "bold" if bar.kind == "level" else "normal"
    axes.annotate(text, (place, top), xytext=(0, 3), textcoords="offset points", ha="center", weight=weight)
