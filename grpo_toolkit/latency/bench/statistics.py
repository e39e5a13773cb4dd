"""The statistics from repeated measurements to a verdict.

Arms take turns in counterbalanced blocks, so that a machine that drifts or is shared slows all of them alike; what is
compared is therefore the ratio of two arms in the same round, never two medians. The interval is a bootstrap over
rounds (Efron and Tibshirani 1993, chapter 13; `scipy.stats.bootstrap`), widened where neighbouring rounds resemble
each other: a busy host slows one of two processes for seconds on end, and thirty such rounds know no more than ten.
Two arms are called the same only when the whole interval lies within 3%, and different only when it lies on one side
of 1 and its median beyond 3%. A wide one around 1 is *cannot tell*, and so is 1.014 (1.003 to 1.054).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.row import Ratio, Summary, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

SAME_WITHIN: Final = 1.03
"""Two arms whose ratio lies between 1/1.03 and 1.03 are the same."""

MIN_PAIRS: Final = 6
"""The median of fewer pairs has no 95% interval: all five on one side of it happens in 1 of 16 cases."""

PERCENTILES: Final = {"p90": (90, 64), "p95": (95, 130), "p99": (99, 662)}
"""Percentile and the smallest sample that carries it: about six values lie beyond it there."""

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 4999
_SEED: Final = 20240229


def summary(values: Sequence[float]) -> Summary:
    """Return median and quartiles (inclusive method: the values are all there is, not a sample of more).

    Percentiles are None unless there are enough values: p90 from 64 on, p95 from 130, p99 from 662.
    """
    if len(values) == 1:
        return Summary(n=1, median=values[0], q1=values[0], q3=values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    found: dict[str, float] = {}
    for name, (percent, least) in PERCENTILES.items():
        if len(values) >= least:
            found[name] = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    return Summary(n=len(values), median=median, q1=q1, q3=q3, **found)


def turns(names: Sequence[str], round_: int) -> list[str]:
    """Return the order of the arms in a round.

    Each block of two rounds begins with another arm and goes back as it came, so every arm is equally often early and
    late, and drift within a block cancels.
    """
    start = (round_ // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order if round_ % 2 == 0 else order[::-1]


def is_steady(seconds: Sequence[float], *, window: int = 3, within: float = 0.05) -> bool:
    """Return whether warm-up is over: the medians of the last two windows agree."""
    if len(seconds) < 2 * window:
        return False
    before = statistics.median(seconds[-2 * window : -window])
    after = statistics.median(seconds[-window:])
    return abs(after - before) <= within * before


def paired_ratio(times: Sequence[float], against: Sequence[float], *, name: str, metric: str = "tpot_s") -> Ratio:
    """Return the ratio of `times` to `against`, paired by round.

    Args:
        times: one arm's seconds, by round.
        against: the other's, in the same rounds.
        name: the other arm's name.
        metric: what was timed, such as "tpot_s".

    Returns:
        The median ratio with its bootstrap interval and the verdict; fewer than `MIN_PAIRS` rounds have no interval.
        The same input gives the same result.

    Raises:
        InputError: no pairs, lists of different lengths, or a time that is not positive.
    """
    if len(times) != len(against) or not times:
        raise InputError(f"{metric}: {len(times)} and {len(against)} measurements cannot be paired")
    if min(*times, *against) <= 0 or not all(map(math.isfinite, (*times, *against))):
        raise InputError(f"{metric}: a measured time is not a positive number")
    logs = [math.log(one / other) for one, other in zip(times, against, strict=True)]
    middle = math.exp(statistics.median(logs))
    if len(logs) < MIN_PAIRS:
        unknown: Verdict = "cannot tell"
        return Ratio(against=name, metric=metric, pairs=len(logs), verdict=unknown, median=middle, low=None, high=None)
    least, most = map(math.exp, _interval(logs))
    found = verdict(len(logs), median=middle, low=least, high=most)
    return Ratio(against=name, metric=metric, pairs=len(logs), verdict=found, median=middle, low=least, high=most)


def paired_difference(times: Sequence[float], against: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the median difference of two arms' times in the same rounds, and its 95% interval, in seconds.

    The interval's ends are None for fewer than `MIN_PAIRS` rounds.
    """
    apart = [one - other for one, other in zip(times, against, strict=True)]
    middle = statistics.median(apart)
    return (middle, *_interval(apart)) if len(apart) >= MIN_PAIRS else (middle, None, None)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if max(values) == min(values):
        return min(values), max(values)
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values),),
        np.median,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(_SEED),
    ).confidence_interval
    median = statistics.median(values)
    wider = _widening(values)
    return median - wider * (median - float(found.low)), median + wider * (float(found.high) - median)


def _widening(values: Sequence[float]) -> float:
    """Return the factor by which the interval of independent rounds is widened for few or dependent ones."""
    from scipy.stats import norm, t

    time = autocorrelation_time(values)
    tail = (1 + CONFIDENCE) / 2
    return math.sqrt(time) * float(t.ppf(tail, max(len(values) / time - 1, 1.5)) / norm.ppf(tail))


def autocorrelation_time(values: Sequence[float]) -> float:
    """Return the number of neighbouring values that tell as much as one independent value; at least 1.

    The sum of autocorrelations as long as pairs of them are positive (Geyer 1992, section 3.3,
    doi:10.1214/ss/1177011137).
    """
    import numpy as np

    around = np.asarray(values) - np.mean(values)
    power = float(around @ around)
    time, lag = 1.0, 1
    while power > 0 and lag + 1 < len(around) // 2:
        pair = float(around[lag:] @ around[:-lag] + around[lag + 1 :] @ around[: -lag - 1]) / power
        if pair <= 0:
            break
        time += 2 * pair
        lag += 2
    return time


def verdict(pairs: int, *, median: float, low: float, high: float) -> Verdict:
    """Return the verdict that the interval of a ratio allows."""
    if pairs < MIN_PAIRS or not low <= median <= high:
        return "cannot tell"
    if low >= 1 / SAME_WITHIN and high <= SAME_WITHIN:
        return "same"
    if low > 1 and median > SAME_WITHIN:
        return "slower"
    if high < 1 and median < 1 / SAME_WITHIN:
        return "faster"
    return "cannot tell"


def span(ratio: Ratio, digits: int = 3) -> str:
    """Return a ratio's interval as "0.971 to 1.034", or "no interval" where too few rounds made one."""
    if ratio.low is None or ratio.high is None:
        return "no interval"
    return f"{ratio.low:.{digits}f} to {ratio.high:.{digits}f}"


def is_settled(ratio: Ratio, *, precision: float) -> bool:
    """Return whether more rounds would tell nothing new: the interval is narrow, or far from 1 beside its width.

    Args:
        ratio: so far.
        precision: how far the interval may reach from its median, as a part of it.
    """
    if ratio.low is None or ratio.high is None:
        return False
    wide = max(math.log(ratio.high / ratio.median), math.log(ratio.median / ratio.low))
    return wide <= math.log1p(precision) or abs(math.log(ratio.median)) > max(4 * wide, math.log(1.1))


def allow_for(ratio: Ratio, control: Ratio | None) -> Ratio:
    """Return the ratio, undecided where an arm against itself (A/A) differs by as much.

    Only "slower" and "faster" claim a difference; they stand if their interval lies beyond the control's.
    """
    if control is None or ratio.verdict not in ("slower", "faster"):
        return ratio
    if ratio.low is None or ratio.high is None or control.low is None or control.high is None:
        return replace(ratio, verdict="cannot tell")
    is_beyond = ratio.low > control.high if ratio.verdict == "slower" else ratio.high < control.low
    return ratio if is_beyond else replace(ratio, verdict="cannot tell")
