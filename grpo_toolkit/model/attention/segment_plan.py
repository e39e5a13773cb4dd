"""The plan for one attention call over many segments: which of them stand in one padded batch, and in which rows.

A vision tower concatenates the patches of all images, and `cu_seqlens` [segments + 1] holds the borders between which
patches see each other: windows in most layers of Qwen2.5-VL, whole images or video frames elsewhere. A plan is made
once for a `cu_seqlens`, that is once or twice a forward, and is used by every layer. Reading the lengths waits for the
device; a layer does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

CALL_COST: Final = {"cuda": 1 << 20, "cpu": 1 << 14}
"""The cost of one more call, in pairs of a query and a key that could be computed instead: a padded batch is split in
two where that saves more than this. On a GPU it is the launches of a call, forward and backward; on a CPU so few pairs
that the padding is under a hundredth of an image's work."""

MAX_BORDERS: Final = 64
"""Lengths at which a batch may end; with more of them than this, only every second, third, ... is tried."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of segments that one call takes: `count` of them, each padded to `length` rows.

    Attributes:
        slots: where each row stands in the padded batch, [rows]; None where nothing is padded.
        mask: which keys are rows, [count, 1, 1, length]; None where nothing is padded.
    """

    count: int
    length: int
    rows: int
    slots: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of segments in padded batches, one call each.

    Attributes:
        batches: the batches.
        order: the rows in the order of the batches, [rows]; None where that is the order they have.
        back: the rows of the batches in their own order again.
    """

    batches: tuple[Batch, ...]
    order: torch.Tensor | None
    back: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """A plan of the attention over the segments of one `cu_seqlens`; parts that no kernel asks for are never made.

    Attributes:
        lengths: rows of each segment, without those of none.
        cu_seqlens: the borders in int32, as variable-length kernels take them.
        call_cost: see `CALL_COST`.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    call_cost: int

    @cached_property
    def rows(self) -> int:
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def is_even(self) -> bool:
        """Return whether all segments have one length: a batch is then a view, and no kernel needs borders."""
        return len(set(self.lengths)) <= 1

    @cached_property
    def layout(self) -> Layout:
        return make_layout(self.lengths, self.cu_seqlens.device, call_cost=self.call_cost)


def batch_lengths(lengths: Sequence[int], *, call_cost: int) -> list[int]:
    """Return the lengths to which batches are padded, ascending, so that padding and calls cost least together.

    A batch takes the segments longer than the batch before it and not longer than its own length L; it costs
    `call_cost` and L * L for each segment.
    """
    if not lengths:
        return []
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length] = counts.get(length, 0) + 1
    distinct = sorted(counts)
    step = -(-len(distinct) // MAX_BORDERS)
    borders = distinct[::-1][::step][::-1]  # the longest is always one
    up_to = [sum(count for length, count in counts.items() if length <= border) for border in borders]
    # best[j]: the least cost of the segments up to border j, and the border where the batch before ends.
    best: list[tuple[int, int]] = []
    for last, border in enumerate(borders):
        best.append(
            min(
                (
                    call_cost
                    + (up_to[last] - (up_to[before] if before >= 0 else 0)) * border * border
                    + (best[before][0] if before >= 0 else 0),
                    before,
                )
                for before in range(-1, last)
            )
        )
    chosen, at = [], len(borders) - 1
    while at >= 0:
        chosen.append(borders[at])
        at = best[at][1]
    return chosen[::-1]


def make_plan(cu_seqlens: torch.Tensor, device: torch.device, *, call_cost: int | None = None) -> SegmentPlan:
    """Plan the attention over the segments between `cu_seqlens`, for rows that are on `device`."""
    import torch

    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist()) if end > start]
    return SegmentPlan(
        lengths=tuple(lengths),
        # Never the tensor that was given: a plan is kept for as long as that lives, so it must not hold it.
        cu_seqlens=cu_seqlens.detach().to(device=device, dtype=torch.int32, copy=True),
        call_cost=CALL_COST.get(device.type, CALL_COST["cuda"]) if call_cost is None else call_cost,
    )


def make_layout(lengths: Sequence[int], device: torch.device, *, call_cost: int) -> Layout:
    """Put segments into batches, with the indices on `device`."""
    import torch

    batches: list[Batch] = []
    order: list[int] = []
    shorter = 0
    for length in batch_lengths(lengths, call_cost=call_cost):
        members = [index for index, own in enumerate(lengths) if shorter < own <= length]
        batches.append(_batch([lengths[index] for index in members], length, device))
        order += members
        shorter = length
    if order == sorted(order):
        return Layout(batches=tuple(batches), order=None, back=None)
    sizes = torch.tensor(lengths)
    starts, ordered = sizes.cumsum(0) - sizes, torch.tensor(order)
    # Where a row stands is where its segment starts, and its place in the segment.
    here = sizes[ordered].cumsum(0) - sizes[ordered]
    rows = torch.arange(int(sizes.sum())) + (starts[ordered] - here).repeat_interleave(sizes[ordered])
    return Layout(batches=tuple(batches), order=rows.to(device), back=rows.argsort().to(device))


def _batch(lengths: list[int], length: int, device: torch.device) -> Batch:
    import torch

    rows = sum(lengths)
    if rows == length * len(lengths):
        return Batch(count=len(lengths), length=length, rows=rows, slots=None, mask=None)
    is_row = torch.arange(length) < torch.tensor(lengths)[:, None]
    slots = is_row.flatten().nonzero().flatten()
    mask = is_row[:, None, None, :]
    return Batch(count=len(lengths), length=length, rows=rows, slots=slots.to(device), mask=mask.to(device))


_PLANS: Any = None


def plan_of(cu_seqlens: torch.Tensor, device: torch.device) -> SegmentPlan:
    """Return the plan of a `cu_seqlens`, made when it is first asked for and kept while the tensor lives.

    The layers of a forward are given one tensor, and a checkpointed layer is given it again when it is recomputed.
    """
    from torch.utils.weak import WeakTensorKeyDictionary

    global _PLANS
    if _PLANS is None:
        _PLANS = WeakTensorKeyDictionary()
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    known = _PLANS.get(cu_seqlens)
    if known is None or known[:2] != (version, device):
        known = _PLANS[cu_seqlens] = (version, device, make_plan(cu_seqlens, device))
    return known[2]  # type: ignore[no-any-return]
