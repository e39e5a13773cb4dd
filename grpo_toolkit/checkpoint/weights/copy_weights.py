"""A saved model's weights under its base's names and dtypes, from file to file: copied, linked or cast, never loaded.

A trainer's full checkpoint mostly is what an export needs, byte for byte. Where a library or a distributed backend has
saved other spellings, float32 for a bfloat16 base, or the tied head once more, that is put right on the way.
"""

from __future__ import annotations

import errno
import math
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import WEIGHTS, WEIGHTS_INDEX
from grpo_toolkit.checkpoint.safetensors_header import (
    FLOAT_NAMES,
    read_safetensors_header,
    read_safetensors_metadata,
    transposed_shape,
)
from grpo_toolkit.checkpoint.tensor_names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, is_embedding, names_by_live
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors
from grpo_toolkit.checkpoint.weights.shard_plan import plan_shards, refuse_full_disk
from grpo_toolkit.checkpoint.weights.shard_writer import (
    COPY_BYTES,
    Entry,
    Shard,
    Span,
    copy_span,
    fill_shards,
    read_at,
    write_at,
    write_shards,
)
from grpo_toolkit.checkpoint.weights.tensor_blocks import (
    Buffer,
    is_finite_in,
    raw_bytes,
    single_threaded,
    worker_count,
)
from grpo_toolkit.errors import UnsupportedError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress

_CAST: Final = "cast"
_TRANSPOSE: Final = "transpose"
_VALUES: Final = 2**20


def plan_copy(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    base: Base,
    *,
    names: Mapping[str, str] | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
) -> list[Shard] | None:
    """Plan how a full model's files become an export's; None where they hold other tensors than the base's.

    Args:
        folder: a folder with a full model.
        tensors: its tensors, as `Checkpoint.tensors` gives them.
        base: its base, which may be the same folder: names and dtypes are the base's.
        names: what tensors of the base are called in the output, where that is something else.
        dtype: safetensors' name of a dtype for every floating-point tensor instead ("BF16").
        max_shard_size: see `plan_shards`.
    """
    found = names_by_live(tensors, base.family)
    extra = {found[live]: live for live in found.keys() - base.stored.keys()}
    inputs = [name for live, name in found.items() if is_embedding(live, INPUT_EMBEDDINGS)]

    def is_tied_head(name: str) -> bool:
        """Return whether a tensor that the base lacks is its tied head, stored again (as FSDP's full state does)."""
        if not (base.is_tied and is_embedding(extra[name], OUTPUT_EMBEDDINGS) and len(inputs) == 1):
            return False
        return equal_tensors(folder, tensors[name], folder, tensors[inputs[0]])

    if base.stored.keys() - found.keys() or not all(map(is_tied_head, extra)):
        return None
    kept = {found[live]: base.stored[live] for live in base.stored}
    dtypes: dict[str, str] = {}
    for ours, theirs in kept.items():
        is_float = base.tensors[theirs].dtype in FLOAT_NAMES and tensors[ours].dtype in FLOAT_NAMES
        dtypes[ours] = dtype if dtype is not None and is_float else base.tensors[theirs].dtype
        if tensors[ours].shape != base.tensors[theirs].shape or (dtypes[ours] != tensors[ours].dtype and not is_float):
            return None
    return plan_shards(
        folder,
        {name: tensors[name] for name in kept},
        work={name: _CAST for name, wanted in dtypes.items() if wanted != tensors[name].dtype},
        names={ours: (names or {}).get(theirs, theirs) for ours, theirs in kept.items()},
        dtypes=dtypes,
        max_shard_size=max_shard_size,
    )


def copy_weights(
    source: Path,
    tensors: Mapping[str, TensorInfo],
    shards: Sequence[Shard],
    folder: Path,
    *,
    link: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write what `plan_copy` planned. Files in which nothing changes are copied or linked as they are.

    Args:
        source: the folder that the weights come from.
        tensors: its tensors.
        shards: the plan.
        folder: an existing folder.
        link: make hard links where the file system lets; what edits one of the two files in place then edits both.
        progress: called with the bytes done and the bytes in all.

    Raises:
        VerificationError: a value does not fit into the new dtype.
        InputError: no room, or no permission.
    """
    planned = {entry.name: shard.file for shard in shards for entry in shard.entries if entry.work is None}
    if planned == {name: info.file for name, info in tensors.items()}:
        _copy_files(source, shards, folder, link=link, progress=progress)
        return
    refuse_full_disk(folder, shards)
    with single_threaded() as setup:
        write_shards(shards, folder, fill=_write_cast, workers=worker_count(), setup=setup, progress=progress)


def rewrite_shard(
    source: Path,
    target: Path,
    *,
    renames: Mapping[str, str | None],
    dtypes: Mapping[str, str],
    transposed: Container[str] = (),
    added: Sequence[Entry] = (),
    inside: bool = False,
) -> int:
    """Write a safetensors file anew with its tensors renamed, dropped, cast or transposed; returns how many there are.

    Args:
        source: the file.
        target: another one, which must not be there.
        renames: new names of tensors by their present ones; None drops a tensor.
        dtypes: safetensors' names of new dtypes, by present names; floating-point tensors alone can be cast.
        transposed: tensors whose last two dimensions change places, by present names.
        added: tensors of other files that are written behind them, see `added_entry`.
        inside: refuse a file that is a link out of its folder.

    Raises:
        CheckpointError: the source is damaged.
        UnsupportedError: a cast from or to a dtype that is not floating-point.
        VerificationError: a value does not fit into the new dtype; the target is incomplete.
        OSError: the target cannot be written.
    """
    entries = []
    for name, info in sorted(read_safetensors_header(source, inside=inside).items(), key=lambda item: item[1].span):
        new, dtype = renames.get(name, name), dtypes.get(name, info.dtype)
        if new is not None:
            is_cast = dtype != info.dtype
            if is_cast and not {dtype, info.dtype} <= FLOAT_NAMES.keys():
                raise UnsupportedError(f"{source}: {name}: no cast from {info.dtype} to {dtype}; only floats are cast")
            span = Span(path=source, begin=info.span[0], end=info.span[1], dtype=info.dtype)
            shape = transposed_shape(info.shape) if name in transposed else info.shape
            work = _TRANSPOSE if name in transposed else _CAST if is_cast else None
            entries.append(Entry(name=new, dtype=dtype, shape=shape, source=span, work=work))
    entries += added
    metadata = read_safetensors_metadata(source, inside=inside)
    shard = Shard(
        file=target.name, entries=tuple(entries), metadata={"format": "pt"} if metadata is None else metadata
    )
    _write_alone(shard, target.parent)
    return len(entries)


def added_entry(name: str, info: TensorInfo, folder: Path, *, dtype: str | None = None) -> Entry:
    """Return a tensor of a folder as it is written under `name` into another: copied, or cast to `dtype`."""
    span = Span(path=folder / info.file, begin=info.span[0], end=info.span[1], dtype=info.dtype)
    wanted = info.dtype if dtype is None or info.dtype not in FLOAT_NAMES else dtype
    return Entry(name=name, dtype=wanted, shape=info.shape, source=span, work=None if wanted == info.dtype else _CAST)


def write_shard(file: str, entries: Sequence[Entry], folder: Path) -> None:
    """Write tensors of other files into a new file of `folder`; the index is the caller's.

    Raises:
        InputError: no room.
        VerificationError: a value does not fit into the new dtype.
        OSError: the file cannot be written.
    """
    shard = Shard(file=file, entries=tuple(entries))
    refuse_full_disk(folder, [shard])
    _write_alone(shard, folder)


def _write_alone(shard: Shard, folder: Path) -> None:
    """Write one file and see it on the disk."""
    has_work = any(entry.work for entry in shard.entries)
    with single_threaded() if has_work else nullcontext() as setup:  # torch is loaded for what is not a copy alone
        # One thread: a repair's steps then have one order, which is what can be killed at each of them and tested.
        for _ in fill_shards([shard], folder, fill=_write_changed, workers=1, setup=setup):
            pass
    with (folder / shard.file).open("rb") as file:
        os.fsync(file.fileno())


def _copy_files(source: Path, shards: Sequence[Shard], folder: Path, *, link: bool, progress: Progress | None) -> None:
    files = [source / shard.file for shard in shards]
    total, done = sum(path.stat().st_size for path in files), 0
    for shard, path in zip(shards, files, strict=True):
        if not (link and _hard_link(path, folder / path.name)):
            refuse_full_disk(folder, [shard])
            for copied in _copy_file(path, folder / path.name):
                if progress is not None:
                    progress(done + copied, total)
        done += path.stat().st_size
    if [path.name for path in files] != [WEIGHTS]:
        for _ in _copy_file(source / WEIGHTS_INDEX, folder / WEIGHTS_INDEX):
            pass


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(os.path.realpath(source), target)  # a Hub snapshot's files are links themselves
    except OSError as error:
        # Another file system, or one without links: https://man7.org/linux/man-pages/man2/link.2.html
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _copy_file(source: Path, target: Path) -> Iterator[int]:
    """Copy a file whole, a piece at a time; yields the bytes done."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        size = source.stat().st_size
        for begin in range(0, size, COPY_BYTES):
            end = min(begin + COPY_BYTES, size)
            copy_span(Span(path=source, begin=begin, end=end, dtype="U8"), descriptor, begin)
            yield end
    finally:
        os.close(descriptor)


def _write_changed(entry: Entry, descriptor: int, offset: int) -> None:
    (_write_transposed if entry.work == _TRANSPOSE else _write_cast)(entry, descriptor, offset)


def _write_transposed(entry: Entry, descriptor: int, offset: int) -> None:
    """Write a tensor with its last two dimensions in each other's place, a matrix at a time; perhaps cast."""
    import torch

    stored, dtype = (getattr(torch, FLOAT_NAMES[name]) for name in (entry.source.dtype, entry.dtype))
    rows, columns = entry.shape[-2:]
    source = os.open(entry.source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in range(math.prod(entry.shape[:-2])):
            matrix = torch.empty(columns, rows, dtype=stored)
            begin = entry.source.begin + index * matrix.nbytes
            read_at(source, raw_bytes(matrix), begin, entry.source.path)
            turned = _rounded(matrix.T.contiguous(), torch.empty(rows, columns, dtype=dtype), entry)
            write_at(descriptor, raw_bytes(turned), offset + index * turned.nbytes)
    finally:
        os.close(source)


def _write_cast(entry: Entry, descriptor: int, offset: int) -> None:
    """Write a tensor in another dtype, rounded once."""
    import torch

    stored_dtype: Any = getattr(torch, FLOAT_NAMES[entry.source.dtype])
    dtype: Any = getattr(torch, FLOAT_NAMES[entry.dtype])
    count = (entry.source.end - entry.source.begin) // stored_dtype.itemsize
    buffer, rounded = Buffer(), Buffer()
    source = os.open(entry.source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first in range(0, count, _VALUES):
            values = buffer.take(1, min(_VALUES, count - first), stored_dtype)
            begin = entry.source.begin + first * stored_dtype.itemsize
            read_at(source, raw_bytes(values), begin, entry.source.path)
            block = _rounded(values, rounded.take(1, values.shape[1], dtype), entry)
            write_at(descriptor, raw_bytes(block), offset + first * dtype.itemsize)
    finally:
        os.close(source)


def _rounded(values: torch.Tensor, block: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Copy values into a block of another dtype, and return it.

    A cast makes no finite value infinite: that is refused. What is NaN or infinite already stays so, as in a copy; the
    checks of stored values find it.
    """
    import torch

    block.copy_(values)
    if not is_finite_in(values, block.dtype) and not torch.equal(block.isfinite(), values.isfinite()):
        raise VerificationError(
            f"{entry.source.path.name}: {entry.name} has values that are not finite in {block.dtype}, so it is not "
            "cast; keep its dtype"
        )
    return block
