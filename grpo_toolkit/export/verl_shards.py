"""The shards of verl's family (verl, EasyR1, SkyRL, rLLM), read into a model folder that can be exported.

Each rank saved a pickle of its part of every tensor. They are opened with `weights_only=True`, which builds tensors
and nothing else, in a process of their own, and written tensor by tensor: one whole tensor is in memory at a time.
Placements as in verl's own merger: https://github.com/volcengine/verl/blob/main/verl/model_merger/fsdp_model_merger.py
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.base_files import carried_files, copy_files
from grpo_toolkit.checkpoint.folders.layouts import VERL, VERL_SHARD
from grpo_toolkit.checkpoint.folders.look_around import shards_of
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, WEIGHTS
from grpo_toolkit.checkpoint.json_files import open_regular, read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.shard_writer import Entry, Shard, Span, write_at, write_shards
from grpo_toolkit.checkpoint.weights.tensor_blocks import raw_bytes
from grpo_toolkit.errors import CheckpointError, UnsupportedError, WorkerError
from grpo_toolkit.model.generation.model_process import ModelProcess, answering

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

_CONFIGS: Final = "huggingface"
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@contextmanager
def as_model_folder(source: Path, *, beside: Path, base: Path | None) -> Iterator[Path]:
    """Yield a folder that holds a model or an adapter: `source` itself, or one made of verl's shards.

    Args:
        source: any folder; of a verl run the run, `global_step_N`, `actor` or `actor/huggingface`.
        beside: the folder to publish; what is made lies beside it, and is gone afterwards.
        base: where config and tokenizer come from if the trainer saved none beside the shards.

    Raises:
        CheckpointError: shards are missing or damaged, or are not of tensors alone.
        UnsupportedError: placements that are not read here, or the shards of a LoRA.
    """
    shards = shards_of(source)
    if shards is None or shards.layout is not VERL:
        yield source
        return
    configs = shards.path / _CONFIGS if (shards.path / _CONFIGS / CONFIG).is_file() else base
    if configs is None:
        raise CheckpointError(f"{shards.path}: no {_CONFIGS}/{CONFIG} beside the shards; pass base= (--base)")
    files = shard_files(shards.path)
    prefix = f".{beside.name}.shards-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=beside.absolute().parent) as made:
        folder = Path(made)
        named = [configs / name for name in (CONFIG, GENERATION_CONFIG) if (configs / name).is_file()]
        copy_files([*named, *carried_files(configs)], configs, folder)
        _read_in_a_process(shards.path, files, folder)
        yield folder


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


def _read_in_a_process(shards: Path, files: Sequence[str], folder: Path) -> None:
    setup = {"files": list(files), "folder": str(folder)}
    with _Reader(shards, setup, module=__name__) as reader:
        try:
            reader.wait()
        except WorkerError as error:
            text = str(error)
            if "UnsupportedError: " in text:
                raise UnsupportedError(text.partition("UnsupportedError: ")[2]) from error
            raise CheckpointError(f"{shards}: its shards cannot be read: {text.partition(': ')[2]}") from error


class _Reader(ModelProcess):
    """The process that opens the pickles."""

    def wait(self) -> None:
        """Wait until every tensor is written."""
        self._receive()


def serve() -> None:
    """Serve as the process: join the shards that the first line of standard input names."""
    with answering() as answer:
        setup = json.loads(sys.stdin.readline())
        join_shards(Path(setup["path"]), setup["files"], Path(setup["folder"]))
        answer({})


def join_shards(shards: Path, files: Sequence[str], folder: Path) -> None:
    """Write `model.safetensors` of the ranks' shards into a folder whose config says the dtype and the tie."""
    import torch

    states = [_load(shards / file) for file in files]
    config = read_json(folder / CONFIG)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    dtype = _dtype(config.get("dtype", config.get("torch_dtype")) or text.get("dtype", text.get("torch_dtype")))
    names = list(states[0])
    for state in states[1:]:
        if state.keys() != states[0].keys():
            raise CheckpointError(f"{shards}: the ranks hold different tensors")
    if any(".lora_" in name for name in names):
        raise UnsupportedError(
            f"{shards}: the shards of a LoRA; export the adapter that lies beside them, {shards / 'lora_adapter'}"
        )
    head = next((name for name in names if name.endswith(_HEAD)), None)
    embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is True
    if is_tied and head and embedding and torch.equal(_joined(states, head), _joined(states, embedding)):
        names.remove(head)
    entries = [_entry(states, name, dtype, shards / files[0]) for name in names]

    def fill(entry: Entry, descriptor: int, offset: int) -> None:
        tensor = _joined(states, entry.name).to(entry.work).contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{shards}: {entry.name} joins to {list(tensor.shape)}, not {list(entry.shape)}")
        if tensor.numel():
            write_at(descriptor, raw_bytes(tensor.reshape(1, -1)), offset)

    write_shards([Shard(file=WEIGHTS, entries=tuple(entries))], folder, fill=fill, workers=1)


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


def _entry(states: Sequence[dict[str, Any]], name: str, dtype: torch.dtype | None, path: Path) -> Entry:
    value = states[0][name]
    stored = value.dtype if dtype is None or not value.is_floating_point() else dtype
    known = _CODES.get(str(stored).removeprefix("torch."))
    if known is None:
        raise UnsupportedError(f"{path}: {name} is {stored}, which is not written here")
    # A DTensor says the shape of the whole.
    shape = tuple(value.shape) if _is_dtensor(value) else tuple(_joined(states, name).shape)
    return Entry(name=name, dtype=known, shape=shape, source=Span(path=path, begin=0, end=0, dtype=known), work=stored)


_CODES: Final = {name: code for code, name in FLOAT_NAMES.items()} | {"int64": "I64", "int32": "I32", "bool": "BOOL"}


def _dtype(name: Any) -> torch.dtype | None:
    import torch

    return getattr(torch, name) if name in FLOAT_NAMES.values() else None


def _joined(states: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """Return a whole tensor of its parts."""
    import torch

    parts = [state[name] for state in states]
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
