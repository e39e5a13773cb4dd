"""The exact split of the difference between two measurements, to the last digit.

    E2E = TTFT + (n - 1) x TPOT + detokenising, and TTFT is the sum of its phases

A product that changes in both factors is split evenly between them (Shapley 1953): the number of tokens is charged at
the mean time per token of the two, the time per token at the mean number. So the parts sum to the difference, whatever
the order. Medians do not add up; a request is therefore stood for by its median round, a timeline that really was.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.row import Effect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.timeline import Timeline

PHASES: Final = {
    "tokenize_s": "tokenising",
    "image_s": "image preprocessing",
    "transfer_s": "transfer to the device",
    "vision_s": "vision tower",
}
"""Keys of `Timeline.phases_s` with their names in the split. The tower's time is that of all its runs: without a cache
it may run for every token."""

PREFILL: Final = "prefill"
NUMBER: Final = "number of tokens"
PER_TOKEN: Final = "time per token"
DETOKENIZE: Final = "detokenising"
PARTS: Final = (*PHASES.values(), PREFILL, NUMBER, PER_TOKEN, DETOKENIZE)
"""The parts of a split, in the order in which a request goes through them."""


def median_round(timelines: Sequence[Timeline]) -> Timeline:
    """Return the round of one request whose E2E is the (lower) median."""
    middle = statistics.median_low(timeline.e2e_s for timeline in timelines)
    return next(timeline for timeline in timelines if timeline.e2e_s == middle)


def split_exactly(base: Sequence[Timeline], trained: Sequence[Timeline]) -> list[Effect]:
    """Split the difference between two arms' mean E2E into phases, number of tokens and time per token.

    Args:
        base, trained: one timeline for each request, in the same order.

    Returns:
        Effects that sum to the difference, in the order in which a request goes through them; phases in which neither
        arm spent any time are left out.

    Raises:
        InputError: nothing to pair.
    """
    if len(base) != len(trained) or not base:
        raise InputError(f"{len(base)} and {len(trained)} timelines cannot be paired")
    sums: dict[str, float] = {}
    for one, other in zip(base, trained, strict=True):
        for name, seconds in _split(one, other).items():
            sums[name] = sums.get(name, 0.0) + seconds / len(base)
    return [Effect(layer="exact", cause=name, effect_s=sums[name]) for name in PARTS if sums.get(name)]


def _split(base: Timeline, trained: Timeline) -> dict[str, float]:
    parts = {
        name: trained.phases_s.get(key, 0.0) - base.phases_s.get(key, 0.0)
        for key, name in {**PHASES, "detokenize_s": DETOKENIZE}.items()
    }
    (few, short), (many, long) = _decode(base), _decode(trained)
    if few and many:
        parts[NUMBER] = (many - few) * (short / few + long / many) / 2
        parts[PER_TOKEN] = (long / many - short / few) * (few + many) / 2
    else:
        parts[NUMBER] = long - short
    parts[PREFILL] = trained.e2e_s - base.e2e_s - sum(parts.values())  # what is left of the time to the first token
    return parts


def _decode(timeline: Timeline) -> tuple[int, float]:
    """Return the steps after the first token and their time, runs of the vision tower not counted."""
    longest = max(timeline.output_lengths, default=timeline.output_tokens)
    span = timeline.token_times_s[-1] - timeline.token_times_s[0]
    return max(longest - 1, 0), timeline.phases_s.get("decode_s", span)
