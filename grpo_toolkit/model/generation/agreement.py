"""The agreement of two answers: margins of ties, tolerances of logits, first differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.model.generation.evidence import LOGIT_STEPS, Evidence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


TIE_MARGINS: Final = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Logit gap under which rounding may pick either of two tokens, by dtype.

Logits of a language model lie within about +-32, where neighbouring bfloat16 values are 0.125 apart and float16 ones
0.016; twice to three times that spacing covers two roundings. float32 leaves room for another order of summation. On a
GPU a model need not even agree with itself: `policy_noise` measures by how much it does not.
"""


LOGIT_TOLERANCES: Final = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The most that an export's logits may be off the trained model's, by dtype: RMS of the difference over theirs.

float16 keeps 11 bits of a value, bfloat16 8: one rounding is 5e-4 and 4e-3 of it, and some ten layers' roundings add
up as the root of their number. A model that is further than half of this from itself widens it (`logit_noise`).
"""


def rival_gap(rivals: Sequence[Mapping[int, float]], tokens: Sequence[int], where: int) -> float:
    """Return how far another model's token lay below the chosen one; infinite where it was not among the next best."""
    if where >= min(len(rivals), len(tokens)):
        return float("inf")
    return rivals[where].get(tokens[where], float("inf"))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the index where two sequences part, at the latest the shorter one's end; None where they are equal."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def input_differences(expected: Evidence, found: Evidence) -> Iterator[str]:
    """Return a few words on each of the processor's tensors that is not the same in both."""
    for name in sorted(expected.inputs.keys() | found.inputs.keys()):
        want, got = expected.inputs.get(name), found.inputs.get(name)
        if want is None or got is None:
            yield f"{name} is only there with the {'export' if want is None else 'policy'}"
        elif want.shape != got.shape:
            yield f"{name} has the shape {tuple(got.shape)} and not {tuple(want.shape)}"
        elif not want.equal(got):
            yield f"{name} differs by up to {float((want.double() - got.double()).abs().max()):.3g}"


def logit_distance(expected: Evidence, found: Evidence, *, steps: int = LOGIT_STEPS) -> tuple[float, float]:
    """Return how far the logits of the first `steps` tokens are apart: relative (RMS over RMS), and at most.

    Raises:
        ValueError: another vocabulary.
    """
    count = min(steps, len(expected.logits), len(found.logits))
    want, got = expected.logits[:count].double(), found.logits[:count].double()
    if want.shape != got.shape:
        raise ValueError(f"{got.shape[1]} logits and not {want.shape[1]}")
    spread = (want - want.mean(dim=1, keepdim=True)).norm()
    apart = want - got
    return float(apart.norm() / spread), float(apart.abs().max())
