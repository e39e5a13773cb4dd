"""A sharded model with all its weights for a while, so that it need not gather each layer for each token.

It reaches into FSDP2's and DeepSpeed's own records, because neither has a public way to do this and leave no trace:
the training that goes on afterwards must be the one that nobody interrupted (tests/model/test_distributed.py).
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.memory import free_bytes
from grpo_toolkit.model.sharding.gather import is_sharded
from grpo_toolkit.model.sharding.ranks import exchange, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_whole: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Gather a sharded model's weights on every rank where all have room, and share them out again; collective.

    Without room they stay shared out, but for what FSDP2 has sharded of no layer (embeddings, the patch embedding): it
    gathers that in the model's own forward, and transformers 5 looks at the images before that
    (`got mixed torch.Tensor and DTensor`). FSDP1 is left as it is.
    """
    if not is_sharded(model):
        yield
        return
    has_room = not any(exchange(None if _has_room(model) else "no room"))
    is_zero3 = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if is_zero3:
        inside = _whole_under_zero3(model) if has_room else nullcontext()
    else:
        inside = _whole_under_fsdp2(model, every_unit=has_room)
    with inside:
        if has_room:
            _whole.add(model)
        try:
            yield
        finally:
            _whole.discard(model)


def is_collective(model: torch.nn.Module) -> bool:
    """Return whether a forward gathers weights, so that all ranks have to make the same number of them."""
    return is_sharded(model) and model not in _whole


def _has_room(model: torch.nn.Module) -> bool:
    """Return whether all weights, and half as much again for gathering's copies, fit where this rank computes."""
    parameters: list[Any] = list(model.parameters())
    # FSDP2's offloaded shards say that they are on the CPU; their mesh is where they are gathered.
    meshes = [parameter.device_mesh for parameter in parameters if hasattr(parameter, "device_mesh")]
    device = meshes[0].device_type if meshes else str(parameters[0].device)
    free = free_bytes(device)
    ranks = world_size() if device == "cpu" else 1  # at most: which of them are on this machine is not known here
    count = sum(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size() for tensor in parameters)
    return free is None or 1.5 * count * ranks < free


@contextmanager
def _whole_under_zero3(model: torch.nn.Module) -> Iterator[None]:
    import deepspeed

    # A forward without a backward leaves prefetched parameters under way, which cannot be gathered or given back.
    under_way: Any = getattr(model, "ds_inflight_param_registry", {})
    for parameter in list(under_way):
        under_way.pop(parameter).wait()
    with deepspeed.zero.GatheredParameters(list(model.parameters())), _without_deepspeeds_hooks(model):
        yield


@contextmanager
def _without_deepspeeds_hooks(model: torch.nn.Module) -> Iterator[None]:
    """Take off the hooks that give every layer back after its forward; on exit each is in its place again."""
    tables = [table for module in model.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    before = [(table, dict(table)) for table in tables]
    try:
        for table, hooks in before:
            for key, hook in hooks.items():
                if _is_deepspeeds(hook):
                    del table[key]
        yield
    finally:
        for table, hooks in before:
            now = dict(table)  # others may have come, or have removed themselves
            kept = {key: hook for key, hook in hooks.items() if key in now or _is_deepspeeds(hook)}
            table.clear()
            table.update(kept | now)


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None)).startswith("deepspeed")


@contextmanager
def _whole_under_fsdp2(model: torch.nn.Module, *, every_unit: bool) -> Iterator[None]:
    """Unshard the root inside, and with `every_unit` whatever FSDP2 shards by itself, which then stays so."""
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    chosen = [unit for unit in units if every_unit or unit is model]
    states = [unit._get_fsdp_state() for unit in chosen]
    before = [(state, group, group.post_forward_mesh_info) for state in states for group in _groups_of(state)]
    try:
        for unit in chosen:
            unit.unshard()
        for _, group, _ in before:
            group.post_forward_mesh_info = None  # what set_reshard_after_forward(False) sets, and nothing public reads
        yield
    finally:
        for state, group, info in before:
            # A root of which nobody said otherwise keeps its weights after a forward. FSDP2 sets that in the first
            # one, which may have been inside.
            is_root = bool(state._is_root and state._auto_reshard_after_forward)
            group.post_forward_mesh_info = None if is_root else info
        for unit in units:
            _forget_forward(unit._get_fsdp_state())
            unit.reshard()


def _forget_forward(state: Any) -> None:
    """Forget a forward that an exception ended: FSDP2 would go on with it, and reshard nothing."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    for holder in (state, *_groups_of(state)):
        if holder._training_state == TrainingState.FORWARD:
            holder._training_state = TrainingState.IDLE
    state._state_ctx.iter_forward_root = None
    getattr(state, "_modules_to_run_forward", set()).clear()


def _groups_of(state: Any) -> list[Any]:
    """Return the parameter groups of an FSDP2 state; one at most where there is no list of them (torch 2.11)."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
