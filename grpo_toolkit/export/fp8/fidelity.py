"""The distance of a quantised folder from the export that it was made of, in figures with an interval, and a verdict.

Both are asked the same prompts. The quantised one is led along the export's own greedy answer, token by token, so each
of its distributions is compared with the export's at the same place. A reward judges what each says by itself.

The interval is judged, not the figure: a folder passes where it is shown to be within the tolerance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.export.checks import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from grpo_toolkit.model.generation.evidence import Evidence

KL_TOLERANCE: Final = 0.05
"""Nats per token."""
AGREEMENT_TOLERANCE: Final = 0.9
REWARD_TOLERANCE: Final = 0.05
"""Of the largest reward that was paid."""
_RESAMPLES: Final = 2000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure with the 95% interval around it, and the most or least that it may be.

    Attributes:
        value: the figure.
        low, high: the ends of its interval.
        tolerance: the bound that the interval's nearer end has to keep.
        count: of what it is a mean, in words.
    """

    value: float
    low: float
    high: float
    tolerance: float
    count: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3g} (95% interval {self.low:.3g} to {self.high:.3g}; {self.count})"


def check_divergence(pairs: Sequence[tuple[Evidence, Evidence]]) -> tuple[Check, Figure]:
    """Check the mean KL divergence, in nats per token, of the quantised distributions from the export's."""
    values = [_divergences(*pair) for pair in pairs]
    figure = _mean(values, tolerance=KL_TOLERANCE)
    check = Check(
        name="distributions near the export's",
        passed=figure.high <= KL_TOLERANCE,  # which NaN is not
        detail=f"KL divergence {figure} in nats per token; allowed up to {KL_TOLERANCE:g}",
    )
    return check, figure


def check_agreement(pairs: Sequence[tuple[Evidence, Evidence]]) -> tuple[Check, Figure]:
    """Check the share of tokens at which both find the same one the likeliest; tokens are counted each by itself."""
    from scipy.stats import binomtest

    equal = [want.logits.argmax(dim=1).eq(got.logits.argmax(dim=1)) for want, got in pairs]
    right, count = (sum(int(value) for value in values) for values in ([e.sum() for e in equal], map(len, equal)))
    interval = binomtest(right, count).proportion_ci(method="wilson")
    figure = Figure(
        value=right / count,
        low=float(interval.low),
        high=float(interval.high),
        tolerance=AGREEMENT_TOLERANCE,
        count=f"{count} tokens of {len(pairs)} prompts",
    )
    check = Check(
        name="greedy tokens of the export",
        passed=figure.low >= AGREEMENT_TOLERANCE,
        detail=f"agreement {figure}; allowed from {AGREEMENT_TOLERANCE:g}",
    )
    return check, figure


def check_reward(name: str, export: Sequence[float], quantised: Sequence[float]) -> tuple[Check, Figure]:
    """Check the mean change of a reward on the same prompts, from the export's answers to the quantised ones'."""
    allowed = -REWARD_TOLERANCE * max(map(abs, (*export, *quantised)))
    changes = [[got - want] for want, got in zip(export, quantised, strict=True)]
    figure = _mean(changes, tolerance=allowed, unit="prompts")
    means = [sum(values) / len(values) for values in (export, quantised)]
    title = f"reward kept: {name}"
    check = Check(
        name=title,
        passed=figure.low >= allowed,
        detail=f"from {means[0]:.3g} to {means[1]:.3g}, a change of {figure}; allowed down to {allowed:.3g}",
    )
    return check, figure


def _divergences(want: Evidence, got: Evidence) -> list[float]:
    import torch

    count = min(len(want.logits), len(got.logits))
    ours, theirs = (torch.log_softmax(one.logits[:count].double(), dim=1) for one in (want, got))
    return [float(value) for value in (ours.exp() * (ours - theirs)).sum(dim=1)]


def _mean(values: Sequence[Sequence[float]], *, tolerance: float, unit: str = "") -> Figure:
    """Return the mean of all values, and its interval by drawing prompts anew: tokens of one answer go together."""
    import numpy as np

    sums, counts = (np.array([measure(one) for one in values], dtype=float) for measure in (sum, len))
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    means: np.ndarray = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    said = f"{len(values)} {unit}" if unit else f"{int(counts.sum())} tokens of {len(values)} prompts"
    return Figure(
        value=float(sums.sum() / counts.sum()), low=float(low), high=float(high), tolerance=tolerance, count=said
    )
