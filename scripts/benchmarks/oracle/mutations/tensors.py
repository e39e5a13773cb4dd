"""Operators on tensors: dropped, renamed, swapped, of another dtype or shape, zeroed, not finite, cut, doubled."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from scripts.benchmarks.oracle.folders import Tensor, pack, tensor, unpack, weight_files
from scripts.benchmarks.oracle.mutations.operators import operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.benchmarks.oracle.folders import Folder
    from scripts.benchmarks.oracle.mutations.operators import Mutation, Place


@lru_cache(maxsize=16)
def held_in(raw: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file that are only looked at."""
    return unpack(raw)


def _tensors(folder: Folder) -> Iterator[Place]:
    for file in weight_files(folder):
        yield from ((file, (name,), "") for name in sorted(held_in(folder[file])))


def _floats(folder: Folder) -> Iterator[Place]:
    for file in weight_files(folder):
        held = held_in(folder[file])
        yield from ((file, (name,), "") for name in sorted(held) if held[name].dtype in ("F32", "F16", "BF16"))


def _matrices(folder: Folder) -> Iterator[Place]:
    for file in weight_files(folder):
        held = held_in(folder[file])
        yield from ((file, (name,), "") for name in sorted(held) if len(held[name].shape) > 1)


def _edit(folder: Folder, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    held = unpack(folder[file])
    change(held)
    folder[file] = pack(held)


def _map(folder: Folder, made: Mutation, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    def edit(held: dict[str, Tensor]) -> None:
        old = held[made.path[0]]
        held[made.path[0]] = tensor(change(old.values().copy()), old.dtype)

    _edit(folder, made.file, edit)


@operator(_tensors)
def drop_tensor(folder: Folder, made: Mutation) -> None:
    _edit(folder, made.file, lambda held: held.pop(made.path[0]) and None)


@operator(_tensors)
def rename_tensor(folder: Folder, made: Mutation) -> None:
    def edit(held: dict[str, Tensor]) -> None:
        head, _, tail = made.path[0].rpartition(".")
        held[f"{head}_old.{tail}"] = held.pop(made.path[0])

    _edit(folder, made.file, edit)


@operator(_tensors)
def add_tensor(folder: Folder, made: Mutation) -> None:
    """Leave a tensor that nobody asks for beside one."""

    def edit(held: dict[str, Tensor]) -> None:
        held[f"old.{made.path[0]}"] = held[made.path[0]]

    _edit(folder, made.file, edit)


_PREFIXES: Final = ("module.", "_orig_mod.", "base_model.model.", "model.", "policy.", "-model.")


def _prefixes(folder: Folder) -> Iterator[Place]:
    return ((file, (), prefix) for file in weight_files(folder) for prefix in _PREFIXES)


@operator(_prefixes)
def prefix_tensors(folder: Folder, made: Mutation) -> None:
    """Put a prefix before every name of a file, or take one away."""

    def name_of(name: str) -> str:
        return name.removeprefix(made.to[1:]) if made.to.startswith("-") else made.to + name

    _edit(folder, made.file, lambda held: _replace(held, {name_of(name): value for name, value in held.items()}))


def _replace(held: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    held.clear()
    held.update(new)


def _twins(folder: Folder) -> Iterator[Place]:
    for file in weight_files(folder):
        held = held_in(folder[file])
        last: dict[tuple[str, tuple[int, ...]], str] = {}
        for name in sorted(held):
            kind = (held[name].dtype, held[name].shape)
            if kind in last and held[name].data != held[last[kind]].data:
                yield file, (name,), last[kind]
            last[kind] = name


@operator(_twins)
def swap_tensors(folder: Folder, made: Mutation) -> None:
    def edit(held: dict[str, Tensor]) -> None:
        held[made.path[0]], held[made.to] = held[made.to], held[made.path[0]]

    _edit(folder, made.file, edit)


_DTYPES: Final = ("F16", "BF16", "F32", "F64")


def _dtypes(folder: Folder) -> Iterator[Place]:
    for file, path, _ in _floats(folder):
        now = held_in(folder[file])[path[0]].dtype
        yield from ((file, path, dtype) for dtype in _DTYPES if dtype != now)


@operator(_dtypes)
def cast_tensor(folder: Folder, made: Mutation) -> None:
    def edit(held: dict[str, Tensor]) -> None:
        held[made.path[0]] = tensor(held[made.path[0]].values(), made.to)

    _edit(folder, made.file, edit)


def _file_dtypes(folder: Folder) -> Iterator[Place]:
    return ((file, (), dtype) for file in weight_files(folder) for dtype in _DTYPES)


@operator(_file_dtypes)
def cast_all(folder: Folder, made: Mutation) -> None:
    def edit(held: dict[str, Tensor]) -> None:
        for name, value in list(held.items()):
            if value.dtype in _DTYPES:
                held[name] = tensor(value.values(), made.to)

    _edit(folder, made.file, edit)


@operator(_floats)
def zero_tensor(folder: Folder, made: Mutation) -> None:
    _map(folder, made, np.zeros_like)


@operator(_floats)
def nan_tensor(folder: Folder, made: Mutation) -> None:
    _map(folder, made, lambda values: np.full_like(values, np.nan))


@operator(_floats)
def infinite_value(folder: Folder, made: Mutation) -> None:
    def change(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        values.reshape(-1)[0] = np.inf
        return values

    _map(folder, made, change)


@operator(_floats)
def constant_tensor(folder: Folder, made: Mutation) -> None:
    _map(folder, made, lambda values: np.full_like(values, 0.5))


@operator(_matrices)
def transpose_tensor(folder: Folder, made: Mutation) -> None:
    _map(folder, made, lambda values: values.swapaxes(0, -1))


@operator(_floats)
def cut_tensor(folder: Folder, made: Mutation) -> None:
    _map(folder, made, lambda values: values[:-1])


@operator(_floats)
def flatten_tensor(folder: Folder, made: Mutation) -> None:
    """Take the shape from a tensor's numbers, as sharded runs that were not gathered leave it."""
    _map(folder, made, lambda values: values.reshape(-1)[:0])


def _shards(folder: Folder) -> Iterator[Place]:
    files = weight_files(folder)
    if len(files) > 1:
        yield files[0], (), files[1]


@operator(_shards)
def swap_shards(folder: Folder, made: Mutation) -> None:
    folder[made.file], folder[made.to] = folder[made.to], folder[made.file]


@operator(_shards)
def repeat_shard(folder: Folder, made: Mutation) -> None:
    folder[made.to] = folder[made.file]
