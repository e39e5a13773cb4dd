"""The effect of each cause, from arms with some of the causes on.

With causes that act on each other (no cache costs more where answers are longer) an effect depends on what was on
before. Up to three causes every combination is measured and an effect is the mean over all orders (Shapley 1953);
beyond that, over one order and its reverse. Either way the effects sum to all minus none, exactly.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Final, TypeVar

from grpo_toolkit.latency.bench.statistics import MIN_PAIRS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

Arm = frozenset[str]
"""The causes that are on."""

MOST_EXACT: Final = 3
"""Causes up to which all combinations (eight arms) are measured."""

_RESAMPLES: Final = 2000
_Value = TypeVar("_Value", float, "np.ndarray")


def orders_of(causes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the orders in which causes are switched on, from none to all."""
    if len(causes) <= MOST_EXACT:
        return list(permutations(causes))
    return [tuple(causes), tuple(reversed(causes))]


def arms_of(causes: Sequence[str]) -> list[Arm]:
    """Return every combination that is measured, each once, from none to all."""
    found = {frozenset(order[:count]): None for order in orders_of(causes) for count in range(len(order) + 1)}
    return sorted(found, key=lambda arm: (len(arm), sorted(arm)))


def shares(causes: Sequence[str], values: Mapping[Arm, _Value]) -> dict[str, _Value]:
    """Return each cause's effect: what switching it on added, averaged over the orders."""
    orders = orders_of(causes)
    sums: dict[str, _Value] = {}
    for order in orders:
        for count, cause in enumerate(order):
            before = frozenset(order[:count])
            added = (values[before | {cause}] - values[before]) / len(orders)
            sums[cause] = sums[cause] + added if cause in sums else added
    return sums


def resampled_medians(times: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap values of each arm: its mean over requests of the median over rounds, rounds drawn with replacement.

    Args:
        times: seconds, shape (arms, rounds, requests); the same rounds are drawn for all arms, which ran in turns.

    Returns:
        Shape (arms, resamples).
    """
    import numpy as np

    rounds = times.shape[1]
    drawn = np.random.default_rng(seed).integers(0, rounds, size=(_RESAMPLES, rounds))
    return np.stack([np.median(arm[drawn], axis=1).mean(axis=1) for arm in times])


def interval_of(samples: np.ndarray, *, rounds: int) -> tuple[float, float] | None:
    """Return the middle 95% of bootstrap values; None where they come of too few rounds for an interval."""
    import numpy as np

    if rounds < MIN_PAIRS:
        return None
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)
