"""The first sentence of a report: is the export as fast as the base?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from grpo_toolkit.latency.rows.row import METRICS
from grpo_toolkit.reporting.charts.style import label_of, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow, Ratio


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The sentence at the top of a report.

    Attributes:
        figure: a ratio such as "0.98x", or a time where there is nothing to compare with.
        verdict: "faster", "slower", "same", "cannot tell", or "" where no interval was computed.
        sentence: the figures in words.
    """

    figure: str
    verdict: Literal["faster", "slower", "same", "cannot tell", ""]
    sentence: str


def headline_of(review: Review) -> Headline | None:
    """Put the newest comparison, or else the newest explanation, into one sentence; None without either."""
    rows = [row for row in review.arms if row.tpot_s is not None]
    if not rows:
        return _explained(review.explanations[-1]) if review.explanations and not review.arms else None
    subject, reference = _pair(rows)
    assert subject.tpot_s is not None
    name = label_of(subject.arm)
    mine = f"{name[:1].upper()}{name[1:]} {milliseconds(subject.tpot_s.median)} ms per token"
    if reference is None or reference.tpot_s is None:
        figure = f"{milliseconds(subject.tpot_s.median)} ms"
        return Headline(figure=figure, verdict="", sentence=f"{mine}; no second arm to compare with.")
    theirs = f"{label_of(reference.arm)} {milliseconds(reference.tpot_s.median)} ms"
    ratio = next((r for r in subject.ratios if r.against == reference.arm and r.metric == "tpot_s"), None)
    if ratio is None:
        plain = subject.tpot_s.median / reference.tpot_s.median
        sentence = f"{mine}, {theirs}. A ratio of medians without an interval: it may be chance."
        return Headline(figure=f"{plain:.2f}\N{MULTIPLICATION SIGN}", verdict="", sentence=sentence)
    return Headline(
        figure=f"{ratio.median:.2f}\N{MULTIPLICATION SIGN}",
        verdict=ratio.verdict,
        sentence=f"{mine}, {theirs}. {interval(ratio)}",
    )


def _explained(row: ExplanationRow) -> Headline:
    unit = METRICS.get(row.metric, row.metric)
    mine, theirs = f"{milliseconds(row.trained_s)} ms", f"{milliseconds(row.base_s)} ms"
    figure = f"{row.trained_s / row.base_s:.2f}\N{MULTIPLICATION SIGN}" if row.base_s else mine
    sentence = f"{Path(row.trained).name} {mine} {unit}, {Path(row.base).name} {theirs}. The causes are below."
    return Headline(figure=figure, verdict="", sentence=sentence)


def interval(ratio: Ratio) -> str:
    """Return a ratio's interval and verdict in words."""
    words = {
        "same": "the same within 3%",
        "faster": "faster",
        "slower": "slower",
        "cannot tell": "too wide to tell, measure more rounds",
    }
    return f"95% interval {ratio.low:.2f} to {ratio.high:.2f} over {ratio.pairs} rounds: {words[ratio.verdict]}."


def _pair(rows: Sequence[LatencyRow]) -> tuple[LatencyRow, LatencyRow | None]:
    """Return export and base; otherwise an arm that was compared and its base; otherwise the last and the first."""
    by_arm = {row.arm: row for row in rows}
    if "export" in by_arm and "base" in by_arm:
        return by_arm["export"], by_arm["base"]
    for row in rows:
        for ratio in row.ratios:
            if ratio.metric == "tpot_s" and ratio.against in by_arm:
                return row, by_arm[ratio.against]
    return rows[-1], rows[0] if len(rows) > 1 else None
