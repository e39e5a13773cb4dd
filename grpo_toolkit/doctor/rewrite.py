"""A safetensors file written anew with other names or dtypes, a few megabytes in memory at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO, Final

from grpo_toolkit.checkpoint.json_files import open_regular
from grpo_toolkit.checkpoint.safetensors_header import (
    DTYPE_BITS,
    TensorInfo,
    read_safetensors_header,
    read_safetensors_metadata,
)
from grpo_toolkit.checkpoint.weights.shard_writer import encode_header
from grpo_toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.doctor.planned_files import Rewritten

_CHUNK: Final = 16 * 2**20


def rewrite_shard(source: Path, target: Path, weights: Rewritten) -> int:
    """Write `source` to `target` with its tensors renamed, dropped or cast; returns how many were written.

    Raises:
        CheckpointError: the source is damaged.
        UnsupportedError: a cast between other than floating-point dtypes.
    """
    kept: dict[str, tuple[TensorInfo, str]] = {}
    for name, info in sorted(read_safetensors_header(source, inside=True).items(), key=lambda item: item[1].span):
        new = weights.renames.get(name, name)
        if new is not None:
            kept[new] = info, weights.dtypes.get(name, info.dtype)
    metadata = read_safetensors_metadata(source, inside=True)
    sizes = {new: info.nbytes * DTYPE_BITS[dtype] // DTYPE_BITS[info.dtype] for new, (info, dtype) in kept.items()}
    described = ((new, dtype, info.shape, sizes[new]) for new, (info, dtype) in kept.items())
    header = encode_header(described, {"format": "pt"} if metadata is None else metadata)
    with open_regular(source, inside=True) as reader, target.open("xb") as writer:
        writer.write(header)
        for info, dtype in kept.values():
            _copy_tensor(reader, writer, info, dtype)
        writer.flush()
        os.fsync(writer.fileno())
    return len(kept)


def _copy_tensor(reader: BinaryIO, writer: BinaryIO, info: TensorInfo, dtype: str) -> None:
    begin, end = info.span
    reader.seek(begin)
    while begin < end:
        chunk = reader.read(min(_CHUNK, end - begin))
        begin += len(chunk)
        writer.write(chunk if dtype == info.dtype else _cast(chunk, info.dtype, dtype))


def _cast(chunk: bytes, dtype: str, other: str) -> bytes:
    import numpy as np

    forms = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if dtype == "BF16":
        numbers = (np.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype in forms:
        numbers = np.frombuffer(chunk, forms[dtype])
    else:
        raise UnsupportedError(f"no cast from {dtype}; only floating-point weights are cast")
    if other in forms:
        with np.errstate(over="ignore"):  # what is too large becomes an infinity, as in torch
            return numbers.astype(forms[other]).tobytes()
    if other != "BF16":
        raise UnsupportedError(f"no cast to {other}; only floating-point weights are cast")
    bits = numbers.astype("<f4").view("<u4").astype("<u8")
    # Round to nearest, ties to even, as torch does; a NaN must not be rounded into an infinity.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded[is_nan] = ((bits[is_nan] >> 16) | 0x40).astype("<u2")
    result: bytes = rounded.tobytes()
    return result
