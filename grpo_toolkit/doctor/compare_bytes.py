"""Weights compared byte by byte, on request: the only part of a diagnosis that reads them. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.json_files import open_regular
from grpo_toolkit.checkpoint.tensor_names import find_suffix, plan_renames
from grpo_toolkit.doctor.parsed_folder import Digests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder

_CHUNK: Final = 8 * 2**20


def compare_heads(folder: Folder) -> Digests:
    """Compare only the stored head with the embedding."""
    tensors = folder.tensors
    head, embedding = find_suffix(tensors, "lm_head.weight"), find_suffix(tensors, "embed_tokens.weight")
    if head is None or embedding is None:
        return Digests()
    return Digests(heads_differ=not equal_tensors(folder.path, tensors[head], folder.path, tensors[embedding]))


def compare_weights(folder: Folder) -> Digests:
    """Read the weights of a folder, and of its base as far as they are alike."""
    compared, is_the_base = _compare_with_base(folder)
    second = [info for name, info in folder.tensors.items() if ".lora_B" in name]
    return Digests(
        heads_differ=compare_heads(folder).heads_differ,
        compared=compared,
        is_the_base=is_the_base,
        is_zero=bool(second) and all(not any(map(any, _chunks(folder.path, info))) for info in second),
    )


def _compare_with_base(folder: Folder) -> tuple[int, bool]:
    base = folder.base
    if base is None:
        return 0, False
    renames = plan_renames(folder.tensors, frozenset(base.tensors), folder.model_type)
    compared = 0
    for name, info in folder.tensors.items():
        other = base.tensors.get(renames.get(name, name))
        if other is not None:
            if not equal_tensors(folder.path, info, base.path, other):
                return compared, False
            compared += 1
    return compared, compared > 0


def equal_tensors(ours: Path, one: TensorInfo, theirs: Path, other: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers; float32 that is exactly some bfloat16 equals that bfloat16."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return all(a == b for a, b in zip(_chunks(ours, one), _chunks(theirs, other), strict=True))
    if (one.dtype, other.dtype) == ("BF16", "F32"):
        return equal_tensors(theirs, other, ours, one)
    if (one.dtype, other.dtype) != ("F32", "BF16"):
        return False
    wide, narrow = _chunks(ours, one), _chunks(theirs, other, size=_CHUNK // 2)
    return all(
        not any(a[0::4]) and not any(a[1::4]) and a[2::4] == b[0::2] and a[3::4] == b[1::2]
        for a, b in zip(wide, narrow, strict=True)
    )


def _chunks(folder: Path, info: TensorInfo, *, size: int = _CHUNK) -> Iterator[bytes]:
    begin, end = info.span
    with open_regular(folder / info.file, inside=True) as file:
        file.seek(begin)
        while begin < end:
            chunk = file.read(min(size, end - begin))
            if not chunk:
                return
            begin += len(chunk)
            yield chunk
