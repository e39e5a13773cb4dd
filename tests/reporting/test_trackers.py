"""The rows that belong to each run of a tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.reporting.trackers.tracker_runs import read, remember, runs_of
from tests.support.latency_rows import row

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.review import Review


def measured(folder: Path, session: str) -> Review:
    append_rows(folder / "latency.jsonl", [row("base", session=session), row("export", session=session)])
    return load_review(folder)


def sessions(review: Review) -> list[tuple[str | None, list[str]]]:
    return [(facts.get("id"), sorted({r.session for r in own.rows})) for facts, own in runs_of(review, "wandb")]


def test_each_run_has_the_rows_since_it_began(tmp_path: Path) -> None:
    remember(tmp_path, "wandb", {"id": "one"}, None)
    before = measured(tmp_path, "first")
    remember(tmp_path, "wandb", {"id": "two"}, before)
    assert sessions(measured(tmp_path, "second")) == [("one", ["first"]), ("two", ["second"])]


def test_a_run_that_is_gone_on_with_keeps_its_rows(tmp_path: Path) -> None:
    remember(tmp_path, "wandb", {"id": "one", "mode": "online"}, None)
    before = measured(tmp_path, "first")
    remember(tmp_path, "wandb", {"id": "one", "mode": "offline"}, before)
    assert sessions(measured(tmp_path, "second")) == [("one", ["first", "second"])]
    assert read(tmp_path)["wandb"][0]["mode"] == "offline"


def test_without_a_run_all_rows_are_one_runs(tmp_path: Path) -> None:
    measured(tmp_path, "first")
    assert sessions(measured(tmp_path, "second")) == [(None, ["first", "second"])]


def test_a_file_that_a_crash_cut_off_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('{"wandb": [')
    assert read(tmp_path) == {}
    remember(tmp_path, "wandb", {"id": "one"}, None)
    assert read(tmp_path)["wandb"] == [{"id": "one", "rows_before": [0, 0]}]
