"""Strict readers for the JSON files of a model folder that may come from a stranger, and the writer of ours.

A reader refuses, with a `CheckpointError` that names the file: a pipe or a device; JSON that is too large, is nested
too deeply or has one key twice; and with `inside`, for folders from strangers, a link that leads out of the folder (a
user's own base may well be made of links). Standard library only.
"""

from __future__ import annotations

import enum
import json
import os
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

JsonObject = dict[str, Any]

MAX_JSON_BYTES: Final = 64 * 2**20
MAX_JSON_DEPTH: Final = 64
MAX_JSON_CONTAINERS: Final = 4_000_000


class Absent(enum.Enum):
    """The type of `ABSENT`: a key that is not there, which is neither null nor false."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT


def leaves_folder(path: Path) -> bool:
    """Return whether `path` is a link to something outside its folder.

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
    """Return the bytes of a small file.

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


def dump_json(data: Mapping[str, Any]) -> str:
    """Return JSON text as the field's libraries write it: two spaces, no escaped letters, a final newline."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def is_number(value: Any) -> bool:
    """Return whether a value is a number of JSON, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
