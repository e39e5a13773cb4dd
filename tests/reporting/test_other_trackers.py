"""Trackio and TensorBoard: what they got, read back from their own files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.latency.rows.store import read_measurements
from tests.support.wandb_runs import replay, train

if TYPE_CHECKING:
    from pathlib import Path

METRICS = {"ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50", "output_tokens_per_s_p50", "output_tokens_p50",
           "peak_memory_mb", "kv_cache_in_use", "first_answer_ms_p50"}  # fmt: skip
READ = textwrap.dedent(
    """
    import json, sys
    from trackio.sqlite_storage import SQLiteStorage
    found = {project: {run: SQLiteStorage.get_logs(project, run) for run in SQLiteStorage.get_runs(project)}
             for project in SQLiteStorage.get_projects()}
    print(json.dumps(found, default=str))
    """
)


@pytest.fixture
def trackio_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("trackio", reason="an extra")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path / "trackio"


def trackio_logs() -> dict[str, dict[str, list[dict[str, Any]]]]:
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True, env=os.environ)
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def latency_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "latency/row_ids" in line]


def test_trackio_gets_the_rows_in_the_trainers_run_and_a_replay_doubles_nothing(
    qwen: Path, tmp_path: Path, trackio_home: Path
) -> None:
    out = tmp_path / "out"
    trained = train(qwen, out, report_to="trackio")
    assert trained.facts["problems"]["Trackio"] == {}
    ((project, runs),) = trackio_logs().items()
    ((name, lines),) = runs.items()
    assert (project, name) == ("huggingface", "t")
    assert sum("train/loss" in line for line in lines) >= 2
    (row,) = latency_rows(lines)
    (on_disk,) = read_measurements(out / "latency" / "latency.jsonl")
    assert {key for key in row if key.startswith("latency/base/")} == {f"latency/base/{name}" for name in METRICS}
    assert row["train/global_step"] == 2
    assert row["latency/row_ids"] == on_disk.id
    (media,) = [line for line in lines if "latency/report" in line]
    assert {"latency/table", "latency/charts/tpot"} <= media.keys()
    assert replay(out, None, "trackio")["logged"] == 0
    assert len(latency_rows(trackio_logs()["huggingface"]["t"])) == 1


def test_a_replay_restores_a_run_that_trackio_never_saw(qwen: Path, tmp_path: Path, trackio_home: Path) -> None:
    out = tmp_path / "out"
    train(qwen, out, report_to="none")
    assert replay(out, None, "trackio")["logged"] == 1
    assert replay(out, None, "trackio")["logged"] == 0
    ((_, lines),) = trackio_logs()["huggingface"].items()
    assert len(latency_rows(lines)) == 1


def test_tensorboard_gets_the_scalars_in_the_folder_of_the_trainers_writer(qwen: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    trained = train(qwen, out, report_to="tensorboard")
    assert trained.facts["problems"]["TensorBoard"] == {}
    folders = {path.parent for path in out.rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop())).Reload()
    names = set(events.Tags()["scalars"])
    assert {f"latency/base/{name}" for name in METRICS} <= names
    assert "train/loss" in names
    assert [event.step for event in events.Scalars("latency/base/tpot_ms_p50")] == [2]
