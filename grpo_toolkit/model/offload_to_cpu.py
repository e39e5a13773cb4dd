"""A trained model and its optimizer moved off the GPU for a while, so that fresh processes have room there.

Only where it is plain to do: whole tensors of plain parameters that nobody else has views of. Sharded models (FSDP,
ZeRO) and quantised ones stay where they are.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.memory import free_bytes
from grpo_toolkit.model.sharding.gather import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@contextmanager
def parked(model: torch.nn.Module, optimizer: Any = None) -> Iterator[int]:
    """Hold parameters, gradients, buffers and optimizer state on the CPU; put back, bit for bit, on exit.

    The parameters stay the same objects, so optimizers and wrappers that refer to them go on working.

    Args:
        model: the trained model.
        optimizer: its torch optimizer, or accelerate's wrapper of one; another kind stays where it is.

    Yields:
        Bytes that were freed; 0 where nothing is on a GPU, it is not safe to move, or the CPU has no room.
    """
    import torch

    holders = [holder for holder in movable(model, optimizer) if holder.data.device.type == "cuda"]
    count = sum(holder.data.numel() * holder.data.element_size() for holder in holders)
    free = free_bytes("cpu")
    if not holders or (free is not None and count > 0.8 * free):
        yield 0
        return
    away: list[tuple[torch.Tensor, torch.device]] = []
    try:
        for holder in holders:
            away.append((holder, holder.data.device))
            holder.data = holder.data.to("cpu")
        torch.cuda.empty_cache()
        yield count
    finally:
        for holder, device in away:
            holder.data = holder.data.to(device)


def movable(model: torch.nn.Module, optimizer: Any = None) -> list[torch.Tensor]:
    """Return every tensor of a training whose `data` can be replaced; none where that is not safe."""
    import torch

    # Asked first: a shard of FSDP2 has no storage to look at.
    if is_sharded(model) or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters()):
        return []
    found = list(_tensors(model, optimizer))
    filled = [tensor for tensor in found if tensor.numel()]
    has_views = len({tensor.untyped_storage().data_ptr() for tensor in filled}) < len(filled)
    return [] if has_views else found


def _tensors(model: torch.nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    # Others page or quantise their state, and know it by more than its tensors.
    is_plain = type(inner).__module__.startswith("torch.optim")
    for state in inner.state.values() if is_plain else ():
        yield from (value for value in state.values() if hasattr(value, "element_size"))
