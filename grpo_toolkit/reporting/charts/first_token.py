"""The chart of the time to the first token: a bar an arm, split into its phases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.latency.explain.exact_split import PHASES, PREFILL
from grpo_toolkit.reporting.charts.style import (
    LIGHT,
    PHASE_COLOURS,
    label_of,
    legend_below,
    milliseconds,
    name_arms,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow, Timeline

_LEAST_SHARE = 0.09
"""Of the longest bar: a phase that is shorter has no room for its figure."""


def first_token_phases(row: LatencyRow) -> dict[str, float]:
    """Return a row's median TTFT in seconds by phase, split as the phases of all its requests are.

    The tower's runs after the first token (a lost cache) are not in it. Empty without phases.
    """
    parts = [_parts(timeline) for timeline in row.timelines if "prefill_s" in timeline.phases_s]
    sums = {name: sum(part[name] for part in parts) for name in (*PHASES, "prefill_s")}
    whole = sum(sums.values())
    if row.ttft_s is None or whole <= 0:
        return {}
    return {name: row.ttft_s.median * seconds / whole for name, seconds in sums.items() if seconds > 0}


def _parts(timeline: Timeline) -> dict[str, float]:
    parts = {name: timeline.phases_s.get(name, 0.0) for name in (*PHASES, "prefill_s")}
    others = sum(seconds for name, seconds in parts.items() if name != "vision_s")
    return parts | {"vision_s": min(parts["vision_s"], max(0.0, timeline.ttft_s - others))}


def draw_first_token(review: Review) -> Figure | None:
    """Draw a stacked bar an arm, in the order in which a request goes through the phases."""
    found = [(row.arm, phases) for row in review.arms if (phases := first_token_phases(row))]
    if not found:
        return None
    figure = new_figure(1.0 + 0.5 * len(found))
    axes = figure.subplots()
    longest = max(sum(phases.values()) for _, phases in found) * 1e3
    for phase, name in {**PHASES, "prefill_s": PREFILL}.items():
        spans = [phases.get(phase, 0.0) * 1e3 for _, phases in found]
        if max(spans) < 0.002 * longest:  # nothing that an eye could see
            continue
        starts = [_before(phases, phase) * 1e3 for _, phases in found]
        axes.barh(range(len(found)), spans, left=starts, color=PHASE_COLOURS[phase], height=0.6, label=name)
        for place, (start, span) in enumerate(zip(starts, spans, strict=True)):
            if span >= _LEAST_SHARE * longest:
                axes.annotate(
                    milliseconds(span / 1e3), (start + span / 2, place), color=LIGHT["page"], fontsize=8,
                    ha="center", va="center",
                )  # fmt: skip
    for place, (_, phases) in enumerate(found):
        whole = sum(phases.values())
        axes.annotate(
            f"{milliseconds(whole)} ms", (whole * 1e3, place), xytext=(6, 0), textcoords="offset points", va="center",
            weight="bold",
        )  # fmt: skip
    name_arms(axes, [label_of(arm) for arm, _ in found])
    axes.set_xlabel("time to first token (ms)")
    axes.set_xlim(0, longest * 1.2)
    legend_below(figure, columns=3)
    return figure


def _before(phases: dict[str, float], phase: str) -> float:
    order = [*PHASES, "prefill_s"]
    return sum(phases.get(name, 0.0) for name in order[: order.index(phase)])
