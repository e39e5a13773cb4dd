"""The arithmetic of a merge, on files: blocks of rows are read, widened, added to, checked, rounded and written."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.shard_writer import read_at, write_at
from grpo_toolkit.checkpoint.weights.tensor_blocks import Buffer, is_finite_in, raw_bytes
from grpo_toolkit.errors import VerificationError
from grpo_toolkit.merge.low_rank import LowRank, Run, Update, add_rows, give_length, matrix_shape, runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    import torch

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.checkpoint.weights.shard_writer import Entry
    from grpo_toolkit.merge.adapter import Adapter

# Values in one block: in float32 (4 MiB) it stays in a core's cache from reading to rounding.
_BLOCK: Final = 2**20


class TensorFile:
    """The tensors of one safetensors file, read by rows; safe to share between threads."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a whole tensor, in `dtype`."""
        shape = self.tensors[name].shape
        rows, columns = matrix_shape(shape)
        return self.rows(name, 0, rows, columns, Buffer()).reshape(shape).to(dtype)

    def rows(self, name: str, first: int, count: int, columns: int, buffer: Buffer) -> torch.Tensor:
        """Return some rows of a tensor as it is stored, in the memory of `buffer`: shape (count, columns)."""
        import torch

        info = self.tensors[name]
        rows = buffer.take(count, columns, getattr(torch, FLOAT_NAMES[info.dtype]))
        begin = info.span[0] + first * columns * rows.itemsize
        read_at(self._descriptor, raw_bytes(rows), begin, self.path)
        return rows


class _Buffers(threading.local):
    """A worker's own memory: stored rows, the base's where others take their place, the sums, the rounded rows."""

    def __init__(self) -> None:
        self.stored, self.original, self.work, self.rounded = Buffer(), Buffer(), Buffer(), Buffer()


class TensorMerger:
    """The maker of tensors that an adapter changes, or that get another dtype; threads may call `fill` at once.

    Args:
        adapter: what is merged.
        base: what it is merged into.
        names: what tensors of the base are called in the output, where that is something else.

    Attributes:
        changed: the base's names of the tensors whose values in the output are not the base's.
    """

    def __init__(self, adapter: Adapter, base: Base, names: Mapping[str, str] | None = None) -> None:
        self.changed: set[str] = set()
        self._stored = {new: name for name, new in (names or {}).items()}
        self._adapter = TensorFile(adapter.weights, adapter.tensors)
        self._base = {
            file: TensorFile(base.path / file, {name: i for name, i in base.tensors.items() if i.file == file})
            for file in {info.file for info in base.tensors.values()}
        }
        self._file_of = {name: info.file for name, info in base.tensors.items()}
        self._buffers = _Buffers()

    def __enter__(self) -> TensorMerger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._adapter, *self._base.values()):
            file.__exit__(kind, error, trace)

    def fill(self, entry: Entry, descriptor: int, offset: int) -> None:
        """Compute one changed tensor and write it at `offset` of an open file.

        Raises:
            VerificationError: a value of it is not finite.
        """
        import torch

        update: Update = entry.work
        columns = _matrix(entry, update)[1]
        dtype = getattr(torch, FLOAT_NAMES[entry.dtype])
        precise = _precision(entry)
        magnitude = self._adapter.read(update.magnitude, precise).flatten() if update.magnitude else None
        lengths = self._column_lengths(entry, update) if update.lengths_by_column else None
        for first, stored, block in self._sums(entry, update):
            if magnitude is not None:
                part = magnitude if lengths is not None else magnitude[first : first + len(block)]
                give_length(block, part, lengths)
            if not is_finite_in(block, dtype):
                raise VerificationError(
                    f"not published: {entry.name} has values that are not finite in {dtype}; the adapter is broken, "
                    "or its training diverged"
                )
            rounded = self._buffers.rounded.take(len(block), columns, dtype).copy_(block)
            name = self._stored_name(entry)
            if name not in self.changed:
                original = stored
                if update.replaced_by is not None:
                    file = self._base_file(entry)
                    original = file.rows(name, first, len(block), columns, self._buffers.original)
                if not torch.equal(rounded, original.to(dtype)):
                    self.changed.add(name)
            write_at(descriptor, raw_bytes(rounded), offset + first * columns * dtype.itemsize)

    def _stored_name(self, entry: Entry) -> str:
        return self._stored.get(entry.name, entry.name)

    def _base_file(self, entry: Entry) -> TensorFile:
        return self._base[self._file_of[self._stored_name(entry)]]

    def _sums(self, entry: Entry, update: Update) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield blocks of rows: the first row's number, the rows as stored, and `W + scale * left @ right` for them.

        Both blocks are overwritten when the next one is asked for.
        """
        rows, columns = _matrix(entry, update)
        source, name = (
            (self._adapter, update.replaced_by)
            if update.replaced_by
            else (self._base_file(entry), self._stored_name(entry))
        )
        read = partial(self._adapter.read, dtype=_precision(entry))
        parts: Iterator[Run | None] = iter((None,)) if update.added is None else runs(update.added, read)
        for run in parts:
            begin, end = (0, rows) if run is None else (run.first, run.first + run.left.shape[0])
            step = max(1, _BLOCK // columns)
            for first in range(begin, end, step):
                count = min(step, end - first)
                stored = source.rows(name, first, count, columns, self._buffers.stored)
                block = self._buffers.work.take(count, columns, _precision(entry)).copy_(stored)
                yield first, stored, block if run is None else add_rows(block, run, first)

    def _column_lengths(self, entry: Entry, update: Update) -> torch.Tensor:
        import torch

        squares = torch.zeros(_matrix(entry, update)[1], dtype=torch.float64)
        for _, _, block in self._sums(entry, update):
            squares += block.double().square_().sum(dim=0)
        return squares.sqrt_().to(_precision(entry))


def _precision(entry: Entry) -> torch.dtype:
    """Return the dtype to compute in: float32, but for a float64 base."""
    import torch

    return torch.float64 if entry.dtype == "F64" else torch.float32


def _matrix(entry: Entry, update: Update) -> tuple[int, int]:
    return matrix_shape(entry.shape, as_experts=isinstance(update.added, LowRank) and bool(update.added.experts))
