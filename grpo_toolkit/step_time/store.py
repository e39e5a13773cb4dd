"""The file `step_time.jsonl`: a line a step, on disk before it is shown or logged anywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_lines import append_json_lines, read_json_lines, row_of
from grpo_toolkit.errors import InputError
from grpo_toolkit.step_time.rows import SCHEMA_VERSION, StepExplanation, StepRow

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

FILE_NAME: Final = "step_time.jsonl"
_KINDS: Final = {"step": StepRow, "step_explanation": StepExplanation}


@dataclass(frozen=True, kw_only=True)
class StepReview:
    """All rows of a run, oldest first.

    Attributes:
        path: the folder that the files lie in.
        steps: of the first process; a step that was trained again after a resume stands as it was trained last.
        ranks: the steps of the other processes.
        explanations: the newest is the last.
    """

    path: Path
    steps: Sequence[StepRow] = field(default_factory=list)
    ranks: Sequence[StepRow] = field(default_factory=list)
    explanations: Sequence[StepExplanation] = field(default_factory=list)


def file_of(folder: Path, rank: int = 0) -> Path:
    """Return the file of a process: each writes its own, so that none waits for another."""
    return folder / (FILE_NAME if rank == 0 else f"step_time-rank{rank}.jsonl")


class RowWriter:
    """Writes rows in a thread of its own, in order, each on the disk before the next: no step waits for the disk.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step_time")
        self._last: Future[None] | None = None

    def append(self, row: StepRow | StepExplanation) -> None:
        """Have a row written.

        Raises:
            OSError: an earlier one could not be.
        """
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(append_step_rows, self.path, [row])

    def close(self) -> None:
        """Wait until all rows are on the disk.

        Raises:
            OSError: the last one could not be written.
        """
        self._thread.shutdown(wait=True)
        if self._last is not None:
            self._last.result()


def append_step_rows(path: Path, rows: Iterable[StepRow | StepExplanation]) -> None:
    """Append rows, each on the disk when this returns."""
    append_json_lines(path, (row.to_json() for row in rows))


def read_step_rows(path: Path) -> list[StepRow | StepExplanation]:
    """Read the rows back; rows that a crash cut off are left out.

    Raises:
        InputError: not readable, or a line is not a row, or one of another schema version.
    """
    return [step_row_of(data, f"{path}: line {number}") for number, data in read_json_lines(path)]


def step_row_of(data: Any, where: str = "row") -> StepRow | StepExplanation:
    """Return one row from its JSON form.

    Raises:
        InputError: not a row, or of another schema version; the message begins with `where`.
    """
    row: StepRow | StepExplanation = row_of(data, _KINDS, schema_version=SCHEMA_VERSION, where=where)
    return row


def find_step_file(path: str | os.PathLike[str]) -> Path | None:
    """Return the file of a run: given itself, its folder, or the folder of the run; None where there is none."""
    place = Path(path)
    if place.is_file():
        return place if place.name.startswith("step_time") else None
    found = (folder / FILE_NAME for folder in (place, place.parent))
    return next((file for file in found if file.is_file()), None)


def load_step_review(path: str | os.PathLike[str]) -> StepReview:
    """Read a run's steps, of all processes whose files are there.

    Raises:
        InputError: there is no such file, or it can't be read.
    """
    file = find_step_file(path)
    if file is None:
        raise InputError(f"{path}: no {FILE_NAME} there; StepTimeCallback writes it into output_dir")
    rows = read_step_rows(file)
    others = [row for one in sorted(file.parent.glob("step_time-rank*.jsonl")) for row in read_step_rows(one)]
    return StepReview(
        path=file.parent,
        steps=_as_trained_last(row for row in rows if isinstance(row, StepRow)),
        ranks=_as_trained_last(row for row in others if isinstance(row, StepRow)),
        explanations=[row for row in rows if isinstance(row, StepExplanation)],
    )


def _as_trained_last(rows: Iterable[StepRow]) -> list[StepRow]:
    """Return the rows without those that a later training of the same folder took back, by resuming or beginning."""
    kept: list[StepRow] = []
    for row in rows:
        if kept and kept[-1].rank == row.rank:
            kept = [one for one in kept if one.rank != row.rank or one.step < row.step]
        kept.append(row)
    return kept
