"""Stored tensors read in chunks and compared by their bytes. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.json_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo

_CHUNK: Final = 8 * 2**20


def equal_tensors(ours: Path, one: TensorInfo, theirs: Path, other: TensorInfo, *, inside: bool = False) -> bool:
    """Return whether two tensors hold the same numbers; float32 that is exactly some bfloat16 equals that bfloat16.

    Args:
        ours, theirs: the folders.
        one, other: the tensors in them.
        inside: refuse a link that leaves its folder.
    """
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        pairs = zip(read_chunks(ours, one, inside=inside), read_chunks(theirs, other, inside=inside), strict=True)
        return all(a == b for a, b in pairs)
    if (one.dtype, other.dtype) == ("BF16", "F32"):
        return equal_tensors(theirs, other, ours, one, inside=inside)
    if (one.dtype, other.dtype) != ("F32", "BF16"):
        return False
    wide = read_chunks(ours, one, inside=inside)
    narrow = read_chunks(theirs, other, size=_CHUNK // 2, inside=inside)
    return all(
        not any(a[0::4]) and not any(a[1::4]) and a[2::4] == b[0::2] and a[3::4] == b[1::2]
        for a, b in zip(wide, narrow, strict=True)
    )


def read_chunks(folder: Path, info: TensorInfo, *, size: int = _CHUNK, inside: bool = False) -> Iterator[bytes]:
    """Yield a tensor's bytes, `size` at a time."""
    begin, end = info.span
    with open_regular(folder / info.file, inside=inside) as file:
        file.seek(begin)
        while begin < end:
            chunk = file.read(min(size, end - begin))
            if not chunk:
                return
            begin += len(chunk)
            yield chunk
