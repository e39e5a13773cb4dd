"""The file `latency.jsonl`: one measurement a line, on disk before it is shown or logged anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint import json_lines
from grpo_toolkit.latency.rows.row import SCHEMA_VERSION, ExplanationRow, LatencyRow

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE_NAME: Final = "latency.jsonl"
_KINDS: Final = {"measurement": LatencyRow, "explanation": ExplanationRow}


def append_rows(path: Path, rows: Iterable[LatencyRow | ExplanationRow]) -> None:
    """Append rows, each on the disk when this returns."""
    json_lines.append_json_lines(path, (row.to_json() for row in rows))


def read_rows(path: Path) -> list[LatencyRow | ExplanationRow]:
    """Read the rows back; rows that a crash cut off are left out.

    Raises:
        InputError: not readable, or a line is not a row, or one of another schema version.
    """
    return [row_of(data, f"{path}: line {number}") for number, data in json_lines.read_json_lines(path)]


def read_measurements(path: Path) -> list[LatencyRow]:
    """Read the rows of arms alone (see `read_rows`)."""
    return [row for row in read_rows(path) if isinstance(row, LatencyRow)]


def row_of(data: Any, where: str = "row") -> LatencyRow | ExplanationRow:
    """Return one row from its JSON form.

    Raises:
        InputError: not a row, or of another schema version; the message begins with `where`.
    """
    row: LatencyRow | ExplanationRow = json_lines.row_of(data, _KINDS, schema_version=SCHEMA_VERSION, where=where)
    return row
