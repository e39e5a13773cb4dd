"""The pairs of two arms' times in the same rounds, and whether more rounds would tell more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.latency.bench.statistics import MIN_PAIRS, is_settled, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.timeline import Timeline


def pairs_of(
    timelines: Sequence[Timeline], others: Sequence[Timeline], metric: str = "tpot_s"
) -> list[tuple[float, float]]:
    """Return two arms' times in the rounds in which both have one."""
    times = [(getattr(one, metric), getattr(other, metric)) for one, other in zip(timelines, others, strict=True)]
    return [(one, other) for one, other in times if one is not None and other is not None]


def is_precise(arms: Sequence[Sequence[Timeline]], precision: float) -> bool:
    """Return whether every further arm's ratio to the first is known as well as that (see `measure_latency`)."""
    found = [paired_ratio(*zip(*pairs, strict=True), name="first") for pairs in _paces(arms)]
    return all(is_settled(ratio, precision=precision) for ratio in found)


def _paces(arms: Sequence[Sequence[Timeline]]) -> list[list[tuple[float, float]]]:
    """Return each further arm's times per token beside the first's; end to end where too few rounds have both."""
    first, *others = arms
    tpots = [pairs_of(timelines, first) for timelines in others]
    if all(len(pairs) >= min(len(first), MIN_PAIRS) for pairs in tpots):
        return tpots
    return [pairs_of(timelines, first, "e2e_s") for timelines in others]
