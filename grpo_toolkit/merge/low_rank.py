"""The sum that a LoRA adapter adds to a weight, in blocks of rows.

Every flavour is the same sum, `W + scale * left @ right`, over a run of rows of the stored tensor seen as a matrix;
only what is left and what is right differs. DoRA then gives every output (a row, or a column where the matrix is
stored transposed) the length that it was trained to have: `m * (W + D) / |W + D|` (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A pair of an adapter's factors, by their tensors' names, and how they lie on a stored tensor.

    Attributes:
        a: shape (rank, in, ...) for a layer, (experts * rank, in) for stacked experts.
        b: shape (out, rank, ...) or (out, rank * experts).
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        is_transposed: the matrix is stored as (in, out): GPT-2's Conv1D, embeddings, some stacked experts.
        experts: how many are stacked in the factors; 0 for a plain layer.
        part: where the tensor holds a part of one expert: the expert, its first row and how many rows.
    """

    a: str
    b: str
    scale: float
    is_transposed: bool = False
    experts: int = 0
    part: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Bias:
    """A bias that grows by `scale` times a factor's own bias (PEFT's `lora_bias`)."""

    vector: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Update:
    """The changes that an adapter makes to one stored tensor: put another in its place, add to it, scale it.

    Attributes:
        replaced_by: the adapter's tensor that takes its place first (`modules_to_save`, trained biases).
        added: what is added then.
        magnitude: DoRA's trained lengths, one for each output.
    """

    replaced_by: str | None = None
    added: LowRank | Bias | None = None
    magnitude: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the adapter's tensors that the update needs."""
        added = self.added
        factors = (added.a, added.b) if isinstance(added, LowRank) else (added.vector,) if added else ()
        return tuple(name for name in (self.replaced_by, *factors, self.magnitude) if name)

    @property
    def lengths_by_column(self) -> bool:
        """Return whether DoRA's lengths are those of the stored matrix's columns, not of its rows."""
        return self.magnitude is not None and isinstance(self.added, LowRank) and self.added.is_transposed


@dataclass(frozen=True)
class Run:
    """A sum for the rows from `first`: `scale * left @ right`, with left (rows, rank) and right (rank, columns)."""

    first: int
    left: torch.Tensor
    right: torch.Tensor
    scale: float


def scaling(*, alpha: float, rank: int, use_rslora: bool) -> float:
    """Return LoRA's factor; rsLoRA divides by the root of the rank (https://arxiv.org/abs/2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def matrix_shape(shape: tuple[int, ...], *, as_experts: bool = False) -> tuple[int, int]:
    """Return a tensor's rows and columns: outputs by the rest, a vector as one row, experts one below the other."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    if as_experts:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def runs(added: LowRank | Bias, read: Read) -> Iterator[Run]:
    """Yield what is added, from the first row to the last."""
    import torch

    if isinstance(added, Bias):
        vector = read(added.vector)
        yield Run(0, torch.ones(1, 1, dtype=vector.dtype), vector.reshape(1, -1), added.scale)
        return
    a, b = read(added.a), read(added.b)
    if not added.experts:
        a, b = a.flatten(1), b.flatten(1)
        yield Run(0, a.T, b.T, added.scale) if added.is_transposed else Run(0, b, a, added.scale)
        return
    # PEFT's ParamWrapper: rows of A go by expert and then rank, columns of B by rank and then expert.
    a, b = a.reshape(added.experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, added.experts)
    first = 0
    for expert in range(added.experts) if added.part is None else (added.part[0],):
        left, right = b[:, :, expert], a[expert]
        if added.is_transposed:
            left, right = right.T, left.T
        if added.part is not None:
            left = left[added.part[1] : added.part[1] + added.part[2]]
        yield Run(first, left.contiguous(), right.contiguous(), added.scale)
        first += left.shape[0]


def add_rows(block: torch.Tensor, run: Run, first: int) -> torch.Tensor:
    """Add a run to the rows that begin at `first` of the stored matrix; in place."""
    rows = run.left[first - run.first : first - run.first + block.shape[0]]
    return block.addmm_(rows, run.right, alpha=run.scale)


def give_length(block: torch.Tensor, magnitude: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Scale as DoRA does, in place: by row, or by column where the columns' `lengths` are given."""
    import torch

    if lengths is None:
        return block.mul_((magnitude / torch.linalg.vector_norm(block, dim=1))[:, None])
    return block.mul_(magnitude / lengths)
