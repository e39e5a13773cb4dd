"""Safetensors files written as a stream: what stays is copied by the kernel, what changes is written in place.

A file is planned first, header and all, so every tensor's place is known before a weight is read. Workers then fill
the places in any order: reading, arithmetic and writing overlap, and memory is the workers' buffers, whatever the
model's size. Standard library only.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import WEIGHTS, WEIGHTS_INDEX
from grpo_toolkit.checkpoint.json_files import dump_json
from grpo_toolkit.checkpoint.safetensors_header import DTYPE_BITS
from grpo_toolkit.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    Fill = Callable[["Entry", int, int], None]
    Progress = Callable[[int, int], None]

# One request of a copy: long enough to be cheap, short enough that workers share a large file and progress is seen.
COPY_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Span:
    """The bytes of a file that hold a tensor."""

    path: Path
    begin: int
    end: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: the tensor's name in the output.
        dtype: safetensors' name of its dtype there.
        shape: in elements.
        source: the bytes that it is made of.
        work: what `fill` needs to know to make it; None for a plain copy.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Span
    work: Any = None

    @property
    def nbytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An output file: its tensors in the order of their bytes."""

    file: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def header(self) -> bytes:
        """Return length and JSON, padded so that the data is aligned."""
        described: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for entry in self.entries:
            begin, end = end, end + entry.nbytes
            described[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    fill: Fill,
    workers: int = 2,
    setup: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write every shard into `folder`, then the index, where there is more than one file.

    Args:
        shards: what to write; names are unique over all of them.
        folder: an existing folder.
        fill: makes an entry that is not a plain copy: the entry, the open file, the offset to write at.
        workers: threads that copy and fill.
        setup: run once in each of them, before its first `fill`.
        progress: called with the bytes done and the bytes in all.

    Raises:
        InputError: a file cannot be written (no space, no permission); what is there is incomplete.
        CheckpointError: a source ends early.
    """
    total, done = sum(shard.nbytes for shard in shards), 0
    try:
        for written in fill_shards(shards, folder, fill=fill, workers=workers, setup=setup):
            done += written
            if progress is not None:
                progress(done, total)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "; make room and run it again" if error.errno == errno.ENOSPC else ""
        raise InputError(f"{error.filename or folder}: cannot be written ({reason}){hint}") from error
    if len(shards) > 1 or (shards and shards[0].file != WEIGHTS):
        weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / WEIGHTS_INDEX).write_text(dump_json(index), encoding="utf-8")


def fill_shards(
    shards: Sequence[Shard], folder: Path, *, fill: Fill, workers: int = 2, setup: Callable[[], None] | None = None
) -> Iterator[int]:
    """Write every shard into `folder`, without an index; yields the bytes of each part that is done.

    Args: see `write_shards`.

    Raises:
        OSError: a file cannot be written.
        CheckpointError: a source ends early.
    """
    with ExitStack() as opened, ThreadPoolExecutor(workers) as pool:
        tasks = [task for shard in shards for task in _open_shard(shard, folder, opened, _prepared(fill, setup))]
        yield from _carry_out(tasks, pool)


@dataclass(frozen=True)
class _Task:
    """A part of a file to be written: the function that does it, and the place."""

    write: Callable[[int, int], None]
    descriptor: int
    offset: int
    size: int
    is_copy: bool

    def do(self) -> int:
        """Write the part and return its bytes."""
        self.write(self.descriptor, self.offset)
        return self.size


def _prepared(fill: Fill, setup: Callable[[], None] | None) -> Fill:
    """Return `fill`, with `setup` run before its first call in each thread."""
    ready = threading.local()

    def prepared(entry: Entry, descriptor: int, offset: int) -> None:
        if setup is not None and not hasattr(ready, "is_set"):
            setup()
            ready.is_set = True
        fill(entry, descriptor, offset)

    return prepared


def _open_shard(shard: Shard, folder: Path, opened: ExitStack, fill: Fill) -> list[_Task]:
    """Make a file of its full length with its header; return the parts still to be written."""
    header = shard.header()
    descriptor = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    opened.callback(os.close, descriptor)
    os.ftruncate(descriptor, len(header) + shard.nbytes)
    write_at(descriptor, header, 0)
    return list(_tasks(shard, len(header), descriptor, fill))


def _carry_out(tasks: Sequence[_Task], pool: ThreadPoolExecutor) -> Iterator[int]:
    """Do all tasks, and yield the bytes of each."""
    pending = [pool.submit(task.do) for task in _in_turns(tasks)]
    try:
        for future in as_completed(pending):
            yield future.result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _in_turns(tasks: Sequence[_Task]) -> list[_Task]:
    """Order tasks: copies first (they need no library, which is loaded meanwhile), the files taking turns.

    The kernel lets one thread at a time write into a file, and the others spin: with two workers on one file that was
    a tenth of a merge's processor time (ext4).
    """
    counts, order = Counter[tuple[bool, int]](), []
    for number, task in enumerate(tasks):
        counts[task.is_copy, task.descriptor] += 1
        order.append((not task.is_copy, counts[task.is_copy, task.descriptor], number))
    return [tasks[number] for *_, number in sorted(order)]


def _tasks(shard: Shard, offset: int, descriptor: int, fill: Fill) -> Iterator[_Task]:
    """Yield each part of a file; neighbours that are copied are copied together."""
    copied: list[Entry] = []
    begin = offset
    for entry in shard.entries:
        if entry.work is None and (not copied or _follows(copied[-1], entry)):
            copied.append(entry)
        else:
            yield from _copies(copied, begin, descriptor)
            copied, begin = ([entry], offset) if entry.work is None else ([], offset)
            if entry.work is not None:
                yield _Task(partial(fill, entry), descriptor, offset, entry.nbytes, is_copy=False)
                begin = offset + entry.nbytes
        offset += entry.nbytes
    yield from _copies(copied, begin, descriptor)


def _follows(one: Entry, other: Entry) -> bool:
    return one.source.path == other.source.path and one.source.end == other.source.begin


def _copies(entries: list[Entry], offset: int, descriptor: int) -> Iterator[_Task]:
    if not entries:
        return
    path, begin, end = entries[0].source.path, entries[0].source.begin, entries[-1].source.end
    for start in range(begin, end, COPY_BYTES):
        size = min(COPY_BYTES, end - start)
        span = Span(path=path, begin=start, end=start + size, dtype="U8")
        yield _Task(partial(copy_span, span), descriptor, offset + start - begin, size, is_copy=True)


def copy_span(span: Span, descriptor: int, offset: int) -> None:
    """Copy bytes from file to file inside the kernel, which shares them where the file system can (Linux)."""
    source = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done, size = 0, span.end - span.begin
        in_kernel = hasattr(os, "copy_file_range")
        while done < size:
            if in_kernel:
                try:
                    copied = os.copy_file_range(source, descriptor, size - done, span.begin + done, offset + done)
                except OSError as error:
                    # Across file systems, or one that cannot: https://man7.org/linux/man-pages/man2/copy_file_range.2.html
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                    in_kernel = False
                    continue
            else:
                block = os.pread(source, min(size - done, 2**20), span.begin + done)
                write_at(descriptor, block, offset + done)
                copied = len(block)
            if copied == 0:
                raise _cut_off(span.path)
            done += copied
    finally:
        os.close(source)


def read_at(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill the whole buffer from a file.

    Raises:
        CheckpointError: the file ends before that.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise _cut_off(path)
        done += count


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`: one call may write less than it was given."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _cut_off(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: ended while it was read; it is cut off, or something else is writing it")
