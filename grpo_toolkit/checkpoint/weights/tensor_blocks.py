"""Blocks of tensors in memory: reused buffers, raw bytes, a check for finite values, and threads that share them."""

from __future__ import annotations

import importlib
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


def worker_count() -> int:
    """Return how many threads read, compute and write at once: the cores, at least two, so writing never waits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(8, cores))


@contextmanager
def single_threaded() -> Iterator[Callable[[], None]]:
    """Yield what a thread calls first to keep its arithmetic on one core; torch's own setting is put back on exit.

    torch takes seconds to load: that begins here, beside whatever needs none of it.
    """
    loading = threading.Thread(target=importlib.import_module, args=("torch",), daemon=True)
    loading.start()
    lock, before = threading.Lock(), []

    def setup() -> None:
        import torch

        with lock:
            before.append(torch.get_num_threads())
            torch.set_num_threads(1)

    try:
        yield setup
    finally:
        loading.join()
        if before:
            import torch

            torch.set_num_threads(before[0])


class Buffer:
    """A piece of memory that is used again: what `take` returns is good until the next call."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, rows: int, columns: int, dtype: Any) -> torch.Tensor:
        """Return a matrix of this shape and dtype, with any content."""
        import torch

        size = rows * columns * dtype.itemsize
        if self._memory is None or len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(rows, columns)


def raw_bytes(matrix: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor as bytes (NumPy has no bfloat16)."""
    import torch

    array: Any = matrix.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def is_finite_in(block: torch.Tensor, dtype: Any) -> bool:
    """Return whether every value is finite, also when rounded to `dtype` (one pass; NaN is its own extreme)."""
    import torch

    low, high = torch.aminmax(block)
    limit = torch.finfo(dtype).max
    return bool((low >= -limit) & (high <= limit))
