"""A saved model folder as data: its kind, its JSON files and its safetensors headers.

Standard library only. Folders come from strangers, so everything is read by the strict readers of `json_files.py` and
`safetensors_header.py`, and names may not leave the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    WEIGHTS,
    WEIGHTS_INDEX,
    Kind,
)
from grpo_toolkit.checkpoint.folders.look_around import around, shards_of
from grpo_toolkit.checkpoint.json_files import ABSENT, Absent, JsonObject, read_json
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo, read_safetensors_header
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CONFIG",
    "GENERATION_CONFIG",
    "MANIFEST",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "Checkpoint",
    "Kind",
    "open_checkpoint",
]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model or an adapter, made by `open_checkpoint`."""

    path: Path
    kind: Kind

    def json(self, name: str) -> JsonObject | Absent:
        """Return the JSON object in the file `name`, or `ABSENT` where there is no such file."""
        path = self.path / name
        return read_json(path) if path.is_file() else ABSENT

    def weight_files(self) -> list[Path]:
        """Return the safetensors files that hold the weights, in name order; empty where there are none."""
        single = self.path / (ADAPTER_WEIGHTS if self.kind is Kind.ADAPTER else WEIGHTS)
        if single.is_file():
            return [single]
        index_path = self.path / WEIGHTS_INDEX
        if not index_path.is_file():
            return []
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: `weight_map` is not an object; the folder cannot be loaded")
        return [self._shard(name, index_path) for name in _distinct(weight_map.values())]

    def _shard(self, name: object, index_path: Path) -> Path:
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"{index_path}: shard name {name!r} is not a plain file name in this folder")
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names the shard {name}, which is not in the folder")
        return path

    def tensors(self) -> dict[str, TensorInfo]:
        """Return every stored tensor by name, read from the headers alone."""
        found: dict[str, TensorInfo] = {}
        for file in self.weight_files():
            found.update(read_safetensors_header(file))
        return found


def _distinct(names: Iterable[object]) -> list[object]:
    return [*sorted({name for name in names if isinstance(name, str)}), *(n for n in names if not isinstance(n, str))]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Recognise a checkpoint folder.

    Raises:
        CheckpointError: the path is not a folder, or holds neither `config.json` nor `adapter_config.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected one with {CONFIG} or {ADAPTER_CONFIG}")
    if (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(folder, Kind.ADAPTER)
    if (folder / CONFIG).is_file():
        shards = shards_of(folder)
        if shards is not None:
            raise CheckpointError(f"{folder}: no weights here; {shards.path} holds {shards.what}: {shards.command}")
        return Checkpoint(folder, Kind.MODEL)
    raise CheckpointError(f"{folder}: no {CONFIG} and no {ADAPTER_CONFIG}, so this is no checkpoint{around(folder)}")
