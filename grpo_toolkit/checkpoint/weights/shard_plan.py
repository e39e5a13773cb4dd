"""The plan of weight files: each tensor in the file it comes from, or in files of a given size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES, read_safetensors_metadata
from grpo_toolkit.checkpoint.weights.shard_writer import Entry, Shard, Span
from grpo_toolkit.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo

# In the format, but no dtype of torch's that a model could be loaded into.
_UNKNOWN: Final = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2FNUZ", "F8_E4M3FNUZ"})
SPARE_BYTES: Final = 64 * 2**20
"""Bytes for the files that an export writes beside its weights: configs, tokenizer, index."""


def plan_shards(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    *,
    work: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
    max_shard_size: str | int | None = None,
) -> list[Shard]:
    """Plan the output files for the tensors of a folder: its own files and order, unless a size is given.

    Args:
        folder: where the tensors are.
        tensors: by name, as `Checkpoint.tensors` gives them.
        work: what is to be done to some of them (`Entry.work`); the others are copied.
        names: what some of them are called in the output.
        dtypes: what some of them are stored as there; such a tensor has to be among `work`.
        max_shard_size: largest file, as a number of bytes or as "5GB".

    Raises:
        InputError: `max_shard_size` is no size.
        CheckpointError: a tensor's bytes are not those of its dtype and shape.
    """
    by_file: dict[str, list[Entry]] = {}
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].span)):
        entry = _entry(folder, name, info)
        dtype = (dtypes or {}).get(name, info.dtype)
        entry = replace(entry, name=(names or {}).get(name, name), dtype=dtype, work=work.get(name))
        by_file.setdefault(info.file, []).append(entry)
    metadata = {file: read_safetensors_metadata(folder / file) or {} for file in by_file}
    shards = [
        Shard(file=file, entries=tuple(held), metadata={"format": "pt", **metadata[file]})
        for file, held in by_file.items()
    ]
    return shards if max_shard_size is None else split_shards(shards, max_shard_size)


def split_shards(shards: Sequence[Shard], max_shard_size: str | int) -> list[Shard]:
    """Return the same tensors, in the same order, in files of a given size at most.

    Raises:
        InputError: `max_shard_size` is no size.
    """
    by_file = _split([entry for shard in shards for entry in shard.entries], max_shard_size)
    return [Shard(file=file, entries=tuple(held)) for file, held in by_file.items()]


def named_dtype(name: str) -> str:
    """Return safetensors' name of a floating-point dtype, given torch's ("bfloat16", "torch.bfloat16").

    Raises:
        InputError: there is none of that name.
    """
    known = {torch_name: dtype for dtype, torch_name in FLOAT_NAMES.items()}
    if name.removeprefix("torch.") not in known:
        raise InputError(f"dtype {name}: not one of {', '.join(known)}")
    return known[name.removeprefix("torch.")]


def _entry(folder: Path, name: str, info: TensorInfo) -> Entry:
    source = Span(path=folder / info.file, begin=info.span[0], end=info.span[1], dtype=info.dtype)
    entry = Entry(name=name, dtype=info.dtype, shape=info.shape, source=source)
    if info.dtype in _UNKNOWN:
        raise CheckpointError(f"{source.path}: {name} has the dtype {info.dtype}, which is not known here")
    if entry.nbytes != info.nbytes:
        raise CheckpointError(
            f"{source.path}: {name} takes {entry.nbytes} bytes as {info.dtype} of {info.shape}, but {info.nbytes} are "
            "stored"
        )
    return entry


def _split(entries: Sequence[Entry], max_shard_size: str | int) -> dict[str, list[Entry]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {entry.name: entry for entry in entries}
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda entry: entry.nbytes,
            get_storage_id=lambda entry: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise InputError(f"--max-shard-size {max_shard_size}: not a size such as 5GB ({error})") from error
    return {file: [by_name[name] for name in held] for file, held in split.filename_to_tensors.items()}


def refuse_full_disk(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise before anything is written where the weights will not fit.

    Raises:
        InputError: too little room on the folder's file system.
    """
    needed, free = sum(shard.nbytes for shard in shards) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room, or name "
            "a folder on another disk"
        )
