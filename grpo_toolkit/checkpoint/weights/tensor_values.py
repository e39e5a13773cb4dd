"""Values without information in stored tensors: one value throughout, NaN, infinity. Standard library only.

Bytes are compared and searched by the interpreter's own C code, never value by value in Python, so that gigabytes take
seconds.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.json_files import open_regular
from grpo_toolkit.checkpoint.weights.compare_tensors import read_chunks

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo

_WIDTHS: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_CHUNK: Final = 2**20
_BLOCKS: Final = 8
_IN_BLOCK: Final = 32
# The highest byte of a NaN or an infinity, sign and exponent all ones; of float16 the exponent ends inside that byte.
_SUSPECT: Final = {"F16": bytes(b for b in range(256) if b & 0x7C == 0x7C)}
_USUAL: Final = b"\x7f\xff"


def constant_value(folder: Path, info: TensorInfo) -> float | None:
    """Return the one value throughout of a tensor of two floats or more, or None where there are several."""
    width = _WIDTHS.get(info.dtype)
    if width is None or info.nbytes < 2 * width:
        return None
    first = b""
    for chunk in read_chunks(folder, info, size=_CHUNK, inside=True):
        first = first or chunk[:width]
        if chunk != first * (len(chunk) // width):
            return None
    return _number(first, info.dtype)


def is_finite(folder: Path, info: TensorInfo) -> bool:
    """Return whether no value of a tensor of floats is NaN or infinite; True for every other dtype."""
    width = _WIDTHS.get(info.dtype)
    if width is None:
        return True
    suspects = _SUSPECT.get(info.dtype, _USUAL)
    table = bytes(b in suspects for b in range(256))
    for chunk in read_chunks(folder, info, size=_CHUNK, inside=True):
        highest = chunk[width - 1 :: width].translate(table)
        place = highest.find(1)
        while place >= 0:
            if not math.isfinite(_number(chunk[place * width : (place + 1) * width], info.dtype)):
                return False
            place = highest.find(1, place + 1)
    return True


def _number(raw: bytes, dtype: str) -> float:
    code = {"F16": "<e", "F32": "<f", "BF16": "<f", "F64": "<d"}[dtype]
    value: float = struct.unpack(code, b"\0\0" + raw if dtype == "BF16" else raw)[0]
    return value


def sample(folder: Path, info: TensorInfo) -> list[float]:
    """Return up to 256 values of a tensor, in blocks evenly spread over it; none where its dtype is no float's."""
    width = _WIDTHS.get(info.dtype)
    if width is None:
        return []
    count = info.nbytes // width
    starts = {max(0, (count - _IN_BLOCK) * block // (_BLOCKS - 1)) for block in range(_BLOCKS)}
    found: list[float] = []
    begin, _ = info.span
    with open_regular(folder / info.file, inside=True) as file:
        for start in sorted(starts):
            file.seek(begin + start * width)
            raw = file.read(min(_IN_BLOCK, count - start) * width)
            found += [_number(raw[at : at + width], info.dtype) for at in range(0, len(raw) - width + 1, width)]
    return found


def correlation(one: list[float], other: list[float]) -> float | None:
    """Return the correlation of two samples, or None where they are short, not finite, or one value throughout."""
    if len(one) != len(other) or len(one) < 16 or not all(map(math.isfinite, (*one, *other))):
        return None
    means = (sum(values) / len(values) for values in (one, other))
    ours, theirs = ([value - mean for value in values] for values, mean in zip((one, other), means, strict=True))
    spread = math.sqrt(sum(a * a for a in ours) * sum(b * b for b in theirs))
    return sum(a * b for a, b in zip(ours, theirs, strict=True)) / spread if spread > 0 else None
