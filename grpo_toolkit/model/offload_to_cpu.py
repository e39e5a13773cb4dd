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
    from collections.abc import Callable, Iterator

    import torch

    Place = tuple[torch.Tensor, Callable[[torch.Tensor], None]]


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

    places = [(tensor, put) for tensor, put in movable(model, optimizer) if tensor.device.type == "cuda"]
    count = sum(tensor.numel() * tensor.element_size() for tensor, _ in places)
    free = free_bytes("cpu")
    if not places or (free is not None and count > 0.8 * free):
        yield 0
        return
    away: list[tuple[Callable[[torch.Tensor], None], torch.Tensor, torch.device]] = []
    try:
        while places:  # popped one by one: the list would hold on the GPU what is to be freed there
            tensor, put = places.pop()
            away.append((put, tensor.to("cpu"), tensor.device))
            put(away[-1][1])
            del tensor
        torch.cuda.empty_cache()
        yield count
    finally:
        for put, copy, device in away:
            put(copy.to(device))


def movable(model: torch.nn.Module, optimizer: Any = None) -> list[Place]:
    """Return every tensor of a training, with a function that replaces it; none where that is not safe."""
    import torch

    # Asked first: a shard of FSDP2 has no storage to look at.
    if is_sharded(model) or any(type(parameter) is not torch.nn.Parameter for parameter in model.parameters()):
        return []
    places = list(_places(model, optimizer))
    filled = [tensor for tensor, _ in places if tensor.numel()]
    has_views = len({tensor.untyped_storage().data_ptr() for tensor in filled}) < len(filled)
    return [] if has_views else places


def _places(model: torch.nn.Module, optimizer: Any) -> Iterator[Place]:
    for parameter in model.parameters():
        yield parameter.data, _data_setter(parameter)
        if parameter.grad is not None:
            yield parameter.grad.data, _data_setter(parameter.grad)
    for buffer in model.buffers():
        yield buffer.data, _data_setter(buffer)
    inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    # Others page or quantise their state, and know it by more than its tensors.
    is_plain = type(inner).__module__.startswith("torch.optim")
    for state in inner.state.values() if is_plain else ():
        for value in state.values():
            if hasattr(value, "element_size"):
                yield value.data, _data_setter(value)


def _data_setter(tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def put(data: torch.Tensor) -> None:
        tensor.data = data

    return put
