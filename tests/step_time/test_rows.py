"""The file of steps: rows that come back as they were, and a schema that is the one in the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_toolkit.errors import InputError
from grpo_toolkit.step_time.rows import StepRow
from grpo_toolkit.step_time.store import RowWriter, file_of, load_step_review, read_step_rows
from scripts.docs.step_time_schema import json_schema
from tests.support.step_rows import step_row, write_run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = write_run(tmp_path, steps=3)
    found = read_step_rows(file_of(tmp_path))
    assert [row for row in found if isinstance(row, StepRow)] == rows
    assert load_step_review(tmp_path).explanations == [found[-1]]


def test_rows_are_on_the_disk_in_order_when_the_writer_is_closed(tmp_path: Path) -> None:
    writer = RowWriter(file_of(tmp_path / "new"))
    for step in range(1, 30):
        writer.append(step_row(step))
    writer.close()
    assert [row.step for row in load_step_review(tmp_path / "new").steps] == list(range(1, 30))


def test_a_disk_that_takes_nothing_is_an_error_and_not_silence(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    writer = RowWriter(tmp_path / "a file" / "step_time.jsonl")
    writer.append(step_row(1))
    with pytest.raises(OSError):
        writer.close()


def test_lines_that_are_no_rows_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1)
    file = file_of(tmp_path)
    first = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(first | {"wall_s": "long"}) + "\n")
    with pytest.raises(InputError, match="line 1: wall_s"):
        load_step_review(tmp_path)
    file.write_text(json.dumps(first | {"kind": "measurement"}) + "\n")
    with pytest.raises(InputError, match="kind is 'measurement'"):
        load_step_review(tmp_path)


def test_the_schema_in_the_docs_is_this_one() -> None:
    assert json.loads((DOCS / "step_time.schema.json").read_text()) == json_schema()
