"""Model folders in memory: names and bytes, with the tensors of a safetensors file taken apart and put together.

Everything is a function of its input alone, so that a recipe gives the same bytes on every machine and stack.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Folder = dict[str, bytes]
"""The files of a folder: path below it, content."""

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_TYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "u1"}


class Tensor(NamedTuple):
    """A stored tensor: its dtype by safetensors' name, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> np.ndarray[Any, Any]:
        """Return the numbers, float32 for bfloat16."""
        if self.dtype == "BF16":
            return (np.frombuffer(self.data, "<u2").astype("<u4") << 16).view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, _TYPES[self.dtype]).reshape(self.shape)


def tensor(values: np.ndarray[Any, Any], dtype: str) -> Tensor:
    """Return numbers as a stored tensor; bfloat16 is rounded to the nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        nan = np.isnan(values)
        if nan.any():
            data = np.where(nan.ravel(), 0x7FC0, np.frombuffer(data, "<u2")).astype("<u2").tobytes()
    else:
        data = np.ascontiguousarray(values, _TYPES[dtype]).tobytes()
    return Tensor(dtype, tuple(values.shape), data)


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file, tensors in the order of their names."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name in sorted(tensors):
        held = tensors[name]
        header[name] = {"dtype": held.dtype, "shape": list(held.shape), "data_offsets": [at, at + len(held.data)]}
        at += len(held.data)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + b"".join(tensors[name].data for name in sorted(tensors))


def unpack(raw: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    body = memoryview(raw)[8 + length :]
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(body[slice(*entry["data_offsets"])]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def weight_files(folder: Folder) -> list[str]:
    """Return the folder's safetensors files."""
    return sorted(name for name in folder if name.endswith(".safetensors"))


def to_json(value: Any) -> bytes:
    """Return JSON as the folders here have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def digest(folder: Folder) -> str:
    """Return a short hash of the names and bytes of a folder."""
    found = hashlib.sha256()
    for name in sorted(folder):
        found.update(f"{len(name)} {name} {len(folder[name])} ".encode() + folder[name])
    return found.hexdigest()[:16]


def write(folder: Folder, path: Path) -> Path:
    """Write a folder to the disk."""
    path.mkdir(parents=True)
    for name, content in folder.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def read(path: Path) -> Folder:
    """Read a folder from the disk."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def random_tensor(name: str, dtype: str, shape: tuple[int, ...], *, trained: bool) -> Tensor:
    """Return a tensor that depends on nothing but its name: matrices wide enough apart for greedy decoding.

    Norms lie about one, biases about zero. A trained one lies a hundredth beside its base's.
    """
    source = np.random.RandomState(zlib.crc32(name.encode()))
    if dtype not in ("F32", "F16", "BF16"):
        return tensor(np.arange(int(np.prod(shape))).reshape(shape), dtype)
    noise = source.standard_normal(shape)
    values = 0.3 * noise if len(shape) > 1 else 0.1 * noise + ("norm" in name and name.endswith("weight"))
    if trained:
        values = values + 0.01 * np.random.RandomState(zlib.crc32(f"trained {name}".encode())).standard_normal(shape)
    return tensor(np.asarray(values), dtype)
