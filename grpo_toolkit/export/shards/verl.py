"""The shards of verl's family (verl, EasyR1, SkyRL, rLLM): each rank's pickle of its part of every tensor.

Placements as in verl's own merger: https://github.com/volcengine/verl/blob/main/verl/model_merger/fsdp_model_merger.py
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.layouts import VERL_SHARD
from grpo_toolkit.checkpoint.json_files import open_regular
from grpo_toolkit.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch


def shard_files(folder: Path) -> list[str]:
    """Return the names of the ranks' shards, in the order of the ranks.

    Raises:
        CheckpointError: some are missing, or of two sizes of world.
    """
    found = {
        (int(match[1]), int(match[2])): path.name
        for path in sorted(folder.iterdir())
        for match in [re.fullmatch(VERL_SHARD, path.name)]
        if match
    }
    worlds = {world for world, _ in found}
    if len(worlds) != 1:
        raise CheckpointError(f"{folder}: shards of worlds of {sorted(worlds)} ranks; expected one")
    (world,) = worlds
    missing = [rank for rank in range(world) if (world, rank) not in found]
    if missing:
        raise CheckpointError(
            f"{folder}: the shards of {len(missing)} of {world} ranks are missing (rank {missing[0]})"
        )
    return [found[world, rank] for rank in range(world)]


class VerlParts:
    """The ranks' state dicts, mapped into memory."""

    def __init__(self, shards: Path, files: Sequence[str]) -> None:
        self.path = shards / files[0]
        self.nbytes = sum((shards / file).stat().st_size for file in files)
        self._states = [_load(shards / file) for file in files]
        self.names = list(self._states[0])
        if any(state.keys() != self._states[0].keys() for state in self._states[1:]):
            raise CheckpointError(f"{shards}: the ranks hold different tensors")

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return a whole tensor's dtype and shape; a DTensor says the shape of the whole."""
        value = self._states[0][name]
        if _is_dtensor(value) or value.dim() == 0 or len(self._states) == 1:
            return value.dtype, tuple(value.shape)
        return value.dtype, (sum(state[name].shape[0] for state in self._states), *value.shape[1:])

    def joined(self, name: str) -> torch.Tensor:
        """Return a whole tensor of its parts.

        Raises:
            UnsupportedError: it is sharded along two dimensions, or a partial sum.
        """
        import torch

        parts = [state[name] for state in self._states]
        first = parts[0]
        if not _is_dtensor(first):
            return first if first.dim() == 0 or len(parts) == 1 else torch.cat(parts)
        mesh = first.device_mesh.mesh
        placements = first.placements
        shards = [index for index, placement in enumerate(placements) if placement.is_shard()]
        if len(shards) > 1 or any(placement.is_partial() for placement in placements):
            raise UnsupportedError(f"{name} is placed as {placements}; read are shards along one dimension")
        # Copies along the other dimensions of the mesh are equal: the first of each counts.
        chosen = mesh[tuple(slice(None) if index in shards else 0 for index in range(mesh.dim()))]
        local = [parts[rank].to_local() for rank in chosen.reshape(-1).tolist()]
        return local[0] if not shards else torch.cat(local, dim=placements[shards[0]].dim)


def _load(path: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.tensor  # its classes are allowed in a weights_only load once it is imported

    with open_regular(path, inside=True):
        pass
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds other things than tensors by name")
    return state


def _is_dtensor(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
