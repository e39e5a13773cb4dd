"""The file `latency.jsonl`: one measurement a line, on disk before it is shown or logged anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint import json_lines
from grpo_toolkit.latency.rows.row import SCHEMA_VERSION, ExplanationRow, LatencyRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FILE_NAME: Final = "latency.jsonl"
PARTIAL_NAME: Final = "latency.partial.jsonl"
"""The rows of a measurement that goes on, or that ended with its process."""
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


class RoundRows:
    """The rows of one measurement, on disk after every round, so that nothing that ends it loses them.

    Args:
        folder: of `latency.jsonl`; None keeps them in memory alone.

    Attributes:
        rows: those so far.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows: list[LatencyRow] = []

    def keep(self, rows: Sequence[LatencyRow]) -> None:
        """Put the rows so far in the place of those of the round before."""
        self.rows = list(rows)
        if self.folder is None:
            return
        staged = self.folder / f".{PARTIAL_NAME}"
        staged.unlink(missing_ok=True)
        append_rows(staged, rows)
        staged.replace(self.folder / PARTIAL_NAME)

    def finish(self, rows: Sequence[LatencyRow]) -> None:
        """Append the rows of a measurement that is over."""
        if self.folder is not None:
            append_rows(self.folder / FILE_NAME, rows)
            (self.folder / PARTIAL_NAME).unlink(missing_ok=True)
        self.rows = []


def recover_rows(folder: Path) -> int:
    """Append what a measurement left that ended with its process; returns how many rows that were."""
    partial = folder / PARTIAL_NAME
    if not partial.is_file():
        return 0
    rows = read_rows(partial)
    append_rows(folder / FILE_NAME, rows)
    partial.unlink()
    return len(rows)


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
