"""`latency.jsonl`: the truth about every measurement, one row an arm, on disk before anything else hears of it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from grpo_toolkit.latency.measure import LatencyRow

FILE_NAME: Final = "latency.jsonl"


def append_rows(path: Path, rows: Iterable[LatencyRow]) -> None:
    """Append rows, each on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            file.write("\n")  # a crash cut the last row off: keep it from taking the next one with it
        for row in rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows back; rows that a crash cut off are left out.

    Raises:
        InputError: not readable, or a line is not the beginning of a row.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if line.startswith("{"):
                continue
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
    return rows
