"""Files of JSON lines, one object a line, each on the disk before it is shown anywhere."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


def append_json_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Append objects, each on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # a crash cut the last row off: keep it from taking the next one with it
        for one in objects:
            file.write(json.dumps(one, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the objects back, each with the number of its line; lines that a crash cut off are left out.

    Raises:
        InputError: not readable, or a line is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
        except ValueError as error:
            if line.startswith("{"):
                continue
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
        yield number, data
