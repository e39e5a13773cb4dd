"""The first sentence of a report: is the export as fast as the base?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from grpo_toolkit.latency.bench.batches import batches_of_rows
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS
from grpo_toolkit.latency.bench.thinking import subject_of, thinking_in
from grpo_toolkit.latency.rows.row import METRICS
from grpo_toolkit.reporting.charts.style import label_of, milliseconds
from grpo_toolkit.reporting.terminal.two_questions import batch_sentence, thinking_sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow, Ratio, Verdict

NO_INTERVAL: Final = "no interval"


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The sentence at the top of a report.

    It has one estimator, the paired ratio with its interval: the medians of two arms make another ratio, which may
    lie on the other side of 1. Where the interval does not tell, it stands large and the ratio small.

    Attributes:
        figure: a ratio such as "0.98x"; an interval where it cannot be told, "no interval" where there is none; a time
            where there is nothing to compare with.
        verdict: "faster", "slower", "same", "cannot tell", or "" where no interval was computed.
        sentence: the figures in words.
        questions: what thinking costs, and what a larger batch brings, a sentence each, where they were asked.
    """

    figure: str
    verdict: Literal["faster", "slower", "same", "cannot tell", ""]
    sentence: str
    questions: tuple[str, ...] = ()


def headline_of(review: Review) -> Headline | None:
    """Put the newest comparison, or else the newest explanation, into one sentence; None without either."""
    found = _compared(review)
    return None if found is None else replace(found, questions=tuple(question_sentences(review)))


def question_sentences(review: Review) -> list[str]:
    """Return what thinking costs and what a larger batch brings, a sentence each; none of what was not asked."""
    thinking, batches = subject_of(thinking_in(review.rows)), batches_of_rows(review.rows)
    told = [] if thinking is None else [thinking_sentence(thinking)]
    return told if batches is None else [*told, batch_sentence(batches)]


def _compared(review: Review) -> Headline | None:
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
        plain = times(subject.tpot_s.median / reference.tpot_s.median)
        sentence = f"{mine}, {theirs}: {plain}. A ratio of medians without an interval: it may be chance."
        return Headline(figure=NO_INTERVAL, verdict="", sentence=sentence)
    reach = interval_figure(ratio)
    if ratio.verdict != "cannot tell" or reach is None:
        figure = NO_INTERVAL if reach is None else times(ratio.median)
        verdict = "" if reach is None else ratio.verdict
        sentence = f"{mine}, {times(ratio.median)} the {label_of(reference.arm)}'s. {interval(ratio)}"
        return Headline(figure=figure, verdict=verdict, sentence=sentence)
    sentence = (
        f"{mine}. Over the {label_of(reference.arm)}'s: {interval(ratio)} Their median is {times(ratio.median)}."
    )
    return Headline(figure=reach, verdict=ratio.verdict, sentence=sentence)


def _explained(row: ExplanationRow) -> Headline:
    unit = METRICS.get(row.metric, row.metric)
    mine, theirs = f"{milliseconds(row.trained_s)} ms", f"{milliseconds(row.base_s)} ms"
    figure = times(row.trained_s / row.base_s) if row.base_s else mine
    verdict: Verdict | Literal[""] = ""
    if row.low_s is None or row.high_s is None:
        figure = NO_INTERVAL if row.base_s else mine
    elif row.low_s <= 0 <= row.high_s:
        figure, verdict = f"{_signed(row.low_s)} to {_signed(row.high_s)} ms", "cannot tell"
    sentence = f"{Path(row.trained).name} {mine} {unit}, {Path(row.base).name} {theirs}. The causes are below."
    return Headline(figure=figure, verdict=verdict, sentence=sentence)


def times(ratio: float) -> str:
    """Return a ratio as "0.98x"."""
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def interval_figure(ratio: Ratio) -> str | None:
    """Return a ratio's interval as "0.71 to 1.33x", None where too few rounds made one."""
    return None if ratio.low is None or ratio.high is None else f"{ratio.low:.2f} to {times(ratio.high)}"


def interval(ratio: Ratio) -> str:
    """Return a ratio's interval and verdict in words."""
    words = {
        "same": "the same within 3%",
        "faster": "faster",
        "slower": "slower",
        "cannot tell": "too wide to tell, measure more rounds",
    }
    if ratio.low is None or ratio.high is None:
        return f"No interval over {ratio.pairs} round{'s' * (ratio.pairs != 1)}: it takes {MIN_PAIRS}."
    return f"95% interval {ratio.low:.2f} to {ratio.high:.2f} over {ratio.pairs} rounds: {words[ratio.verdict]}."


def _signed(seconds: float) -> str:
    return f"{seconds * 1e3:+.1f}".replace("-", "\N{MINUS SIGN}")


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
