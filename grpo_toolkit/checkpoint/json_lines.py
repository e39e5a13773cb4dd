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


def row_of(data: Any, kinds: Mapping[str, type], *, schema_version: int, where: str) -> Any:
    """Return the row that an object is, of the type that its `kind` names.

    Raises:
        InputError: not a row, or of another schema version; the message begins with `where`.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(data, dict) or data.get("schema_version") != schema_version:
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{where}: schema_version is {found!r}, this version of grpo_toolkit reads {schema_version}")
    if data.get("kind") not in kinds:
        raise InputError(f"{where}: kind is {data.get('kind')!r}, expected one of {sorted(kinds)}")
    try:
        return TypeAdapter(kinds[data["kind"]]).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {key}: {first['msg']}") from error
