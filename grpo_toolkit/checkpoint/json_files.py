"""Strict readers for the files of a model folder that may come from a stranger.

Standard library only, and nothing here reads a weight: a safetensors file begins with eight bytes of length and a
JSON header, which says every tensor's name, dtype, shape and place
(https://github.com/huggingface/safetensors#format).

What a reader refuses it refuses with one `CheckpointError` that names the file: a pipe or a device; JSON that is too
large, nested too deeply or says one key twice; a header that is longer than its file, has tensors that overlap, leave
holes or end after the file, or an unknown dtype; and with `inside`, for folders from strangers, a link that leads out
of the folder (a user's own base may well be made of links). No pickle is ever opened.
"""

from __future__ import annotations

import enum
import json
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

JsonObject = dict[str, Any]

MAX_JSON_BYTES: Final = 64 * 2**20
MAX_JSON_DEPTH: Final = 64
MAX_JSON_CONTAINERS: Final = 4_000_000
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


class Absent(enum.Enum):
    """The type of `ABSENT`: a key that is not there, which is neither null nor false."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

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


def leaves_folder(path: Path) -> bool:
    """Whether `path` is a link to something outside its folder.

    A Hub-cache snapshot is links into the repository's `blobs`, and folders downloaded by older versions are links to
    there from anywhere: those do not count (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
    """
    if not os.path.islink(path):  # noqa: PTH114 - as for paths with a null byte below, which Path cannot ask about
        return False
    home, target = os.path.realpath(path.parent), os.path.realpath(path)
    if os.path.commonpath((home, target)) == home:
        return False
    *_, repository, folder, _name = target.rsplit(os.sep, 3)
    return not (folder == "blobs" and repository.startswith("models--"))


def open_regular(path: Path, *, inside: bool = False) -> BinaryIO:
    """Open a file for reading if it is a regular one in its folder: never waits for a pipe, never touches a device.

    Args:
        path: the file.
        inside: refuse a link that leaves the folder.

    Raises:
        CheckpointError: missing, not permitted, or not a regular file.
    """
    try:
        if inside and leaves_folder(path):
            raise CheckpointError(f"{path}: is a link that leaves its folder; put the file itself there")
        # Asked before opening, because opening a device can have effects, and after, because names can change hands.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise CheckpointError(f"{path}: is not a regular file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> JsonObject:
    """Read one JSON object, bounded in size and depth.

    Raises:
        CheckpointError: unreadable, larger than 64 MiB, not JSON, not an object, nested deeper than 64, or with a
            key that stands twice in one object.
    """
    return parse_json(read_bytes(path, limit=MAX_JSON_BYTES), str(path))


def read_bytes(path: Path, *, limit: int, inside: bool = False) -> bytes:
    """The bytes of a small file.

    Raises:
        CheckpointError: as `open_regular`, or larger than `limit` bytes.
    """
    with open_regular(path, inside=inside) as file:
        try:
            raw = file.read(limit + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > limit:
        raise CheckpointError(f"{path}: larger than {limit / 2**20:.3g} MiB, which no model's JSON is")
    return raw


def parse_json(
    raw: bytes, where: str, *, repeated: list[str] | None = None, containers: int = MAX_JSON_CONTAINERS
) -> JsonObject:
    """Parse one JSON object. A byte-order mark is passed over.

    Args:
        raw: the file's bytes.
        where: the file's path, for messages.
        repeated: collects keys that stand twice in one object (the last one counts); by default they are refused.
        containers: the most objects and lists; an empty one takes two bytes of text and sixty-four of memory.
    """
    if raw.count(b"{") + raw.count(b"[") > containers:
        raise CheckpointError(f"{where}: not valid JSON for a model (more than {containers:,} objects and lists)")
    found: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> JsonObject:
        result = dict(pairs)
        if len(result) < len(pairs):
            found.extend(_repeated(key for key, _ in pairs))
        return result

    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=as_object)
    except RecursionError as error:
        raise CheckpointError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(data).__name__}, expected an object")
    if _is_deeper(data, MAX_JSON_DEPTH):
        raise CheckpointError(f"{where}: not valid JSON for a model (nested deeper than {MAX_JSON_DEPTH} levels)")
    if found and repeated is None:
        raise CheckpointError(f"{where}: the key {found[0]!r} stands twice in one object; keep one of the two")
    if repeated is not None:
        repeated.extend(found)
    return data


def _repeated(keys: Iterable[str]) -> Iterator[str]:
    seen = set()
    for key in keys:
        if key in seen:
            yield key
        seen.add(key)


def _is_deeper(data: JsonObject, limit: int) -> bool:
    level: list[Any] = [data]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list)) and child
        ]
        if not level:
            return False
    return True


def read_safetensors_header(path: Path, *, inside: bool = False) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file says it holds.

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
    """The `__metadata__` of a file that `read_safetensors_header` has accepted; None where it has none."""
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
