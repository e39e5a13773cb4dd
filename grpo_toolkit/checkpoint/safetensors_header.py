"""The header of a safetensors file, read within bounds and without torch; no weight is read.

A file begins with eight bytes of length and a JSON object that gives every tensor's name, dtype, shape and place
(https://github.com/huggingface/safetensors#format). A header is refused if it is longer than its file, has an unknown
dtype, or has tensors that overlap, leave holes or end after the file. Standard library only.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import JsonObject, open_regular, parse_json
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES: Final = 16 * 2**20
MAX_TENSORS: Final = 250_000
DTYPE_BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype in the format."""


FLOAT_NAMES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of the floating-point dtypes that weights are trained and served in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A tensor as its header describes it.

    `dtype` is safetensors' name ("BF16", "F32"), `shape` in elements, `file` the shard's name in the folder, `span`
    the tensor's first byte and the byte after its last, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    span: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def nbytes(self) -> int:
        return self.span[1] - self.span[0]


def transposed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape with its last two dimensions in each other's place."""
    return (*shape[:-2], *reversed(shape[-2:]))


def read_safetensors_header(path: Path, *, inside: bool = False) -> dict[str, TensorInfo]:
    """Read the tensors that a safetensors file lists in its header.

    Raises:
        CheckpointError: truncated, a header over 16 MiB or longer than the file, or not in the format.
    """
    with open_regular(path, inside=inside) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: header of {length} bytes does not fit in a file of {size} bytes")
        raw = file.read(length)
    return parse_safetensors_header(raw, size=size, where=str(path), file=path.name)


def read_safetensors_metadata(path: Path, *, inside: bool = False) -> dict[str, str] | None:
    """Read the `__metadata__` of a file that `read_safetensors_header` has accepted; None where it has none."""
    with open_regular(path, inside=inside) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata: dict[str, str] | None = json.loads(file.read(length)).get("__metadata__")
    return metadata


def parse_safetensors_header(raw: bytes, *, size: int, where: str, file: str) -> dict[str, TensorInfo]:
    """Parse and check the JSON part of a safetensors file.

    Args:
        raw: the header's bytes, without the eight of its length.
        size: bytes of the whole file.
        where: the file's path, for messages.
        file: the file's name, for the tensors.
    """
    try:
        known = _parse_once if len(raw) <= _REMEMBERED else _parse
        return dict(known(raw, size, file))
    except CheckpointError as error:
        raise CheckpointError(f"{where}{error}") from error


_REMEMBERED: Final = 2**20
"""The longest header that is kept, as the checkpoints of a run have the same; larger ones would fill the memory."""


def _parse(raw: bytes, size: int, file: str, where: str = "") -> dict[str, TensorInfo]:
    header = _parse_header(raw, where)
    start = 8 + len(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: damaged safetensors header (`__metadata__` is not a map of strings)")
    tensors = {name: _tensor(name, entry, start, where, file) for name, entry in header.items()}
    end = _end_of_data(tensors, start=start, where=where)
    if end > size:
        raise CheckpointError(f"{where}: {size} bytes, but its header promises {end}; it is cut off")
    if end < size:
        raise CheckpointError(f"{where}: damaged safetensors header ({size - end} bytes belong to no tensor)")
    return tensors


_parse_once = lru_cache(maxsize=8)(_parse)


def _parse_header(raw: bytes, where: str) -> JsonObject:
    # Looking for repeated keys takes a call of Python per object, and there is one per tensor. A header that says a
    # tensor twice has its offsets twice, so only then is it looked at closely.
    tensors = raw.count(b'"data_offsets"')
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"{where}: damaged safetensors header (more than {MAX_TENSORS:,} tensors)")
    if raw.count(b"[") + raw.count(b"{") > 3 * tensors + 100_000 or raw.count(b":") > 4 * tensors + 200_000:
        raise CheckpointError(f"{where}: damaged safetensors header (more in it than its {tensors:,} tensors)")
    try:
        header: JsonObject = json.loads(raw)
        if not isinstance(header, dict) or tensors != len(header) - ("__metadata__" in header):
            header = parse_json(raw, where)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: damaged safetensors header ({str(error).partition(': ')[2]})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged safetensors header (not valid JSON: {error})") from error
    return header


def _tensor(name: str, entry: Any, start: int, where: str, file: str) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        if type(shape) is not list:
            raise ValueError("the shape is no list")
        for size in (begin, end, *shape):
            if type(size) is not int or not 0 <= size < 2**63:
                raise ValueError("sizes are not whole numbers")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: damaged safetensors header ({name[:80]!r}: {error!r})") from error
    for size in [0] if 0 in shape else shape:
        bits *= size
        if bits >= 2**66:  # more than any offset can say; multiplying on could take forever
            break
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: damaged safetensors header ({name[:80]!r}: {dtype} {shape} is not {end - begin} bytes)"
        )
    return TensorInfo(dtype=dtype, shape=tuple(shape), file=file, span=(start + begin, start + end))


def _end_of_data(tensors: dict[str, TensorInfo], *, start: int, where: str) -> int:
    for begin, end in sorted(info.span for info in tensors.values()):
        if begin != start:
            what = "overlap" if begin < start else "leave a hole"
            raise CheckpointError(f"{where}: damaged safetensors header (tensors {what} at byte {min(begin, start)})")
        start = end
    return start
