"""What W&B got, read back from the offline file of a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from grpo_toolkit.latency.store import read_measurements
from grpo_toolkit.tracking.wandb import TABLE_COLUMNS, log_latency, prepare_environment, run_folder

TESTS = Path(__file__).parent
TRAIN = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import conftest  # offline, one thread
    from training import grpo_trainer
    from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback

    base, out = map(Path, sys.argv[1:])
    callbacks = [KVCacheCallback(strict=True), ExportCallback(out / "export", strict=True),
                 LatencyCallback(rounds=2, new_tokens=4, max_new_tokens=None, strict=True)]
    grpo_trainer(base, out, callbacks, report_to="wandb", run_name="t").train()
    """
)


@pytest.fixture(scope="module")
def run_output(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training in a process of its own, so that the run is finished at its exit, as for a user."""
    out = tmp_path_factory.mktemp("wandb-run") / "out"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(TESTS), "NETRC": str(out / "no-netrc"), "HOME": str(out.parent)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(qwen), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout + done.stderr


@pytest.fixture(scope="module")
def records(run_output: tuple[Path, str]) -> list[dict[str, Any]]:
    folders = list((run_output[0] / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folders[0])],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


ARMS = ("base", "checkpoint", "export", "export_no_cache")
METRICS = ("ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50", "output_tokens_per_s_p50", "peak_memory_mb")
NAMES = [f"latency/{arm}/{metric}" for arm in ARMS for metric in METRICS]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def test_the_run_is_finished_and_offline_inside_the_output_folder(records: list[dict[str, Any]]) -> None:
    assert of_kind(records, "exit") == [{"exit_code": 0, "runtime": of_kind(records, "exit")[0]["runtime"]}]
    assert of_kind(records, "run")[0]["display_name"] == "t"


def test_every_metric_is_defined_by_name_on_the_trainers_axis(records: list[dict[str, Any]]) -> None:
    axes = {
        m["name"]: m["step_metric"] for m in of_kind(records, "metric") if m.get("name", "").startswith("latency/")
    }
    assert axes == dict.fromkeys(NAMES, "train/global_step")


def test_scalars_are_one_row_at_the_last_step(run_output: tuple[Path, str], records: list[dict[str, Any]]) -> None:
    rows = [h["item"] for h in of_kind(records, "history") if "latency/export/tpot_ms_p50" in h["item"]]
    assert len(rows) == 1
    assert rows[0]["train/global_step"] == 2
    on_disk = read_measurements(run_output[0] / "latency" / "latency.jsonl")
    assert [row.arm for row in on_disk] == list(ARMS)
    for row in on_disk:
        assert rows[0][f"latency/{row.arm}/tpot_ms_p50"] == pytest.approx(row.tpot_s.median * 1e3)
        assert rows[0][f"latency/{row.arm}/peak_memory_mb"] == pytest.approx(row.memory.peak_bytes / 1e6)


def test_the_trainers_own_rows_are_there_too(records: list[dict[str, Any]]) -> None:
    steps = [h["item"]["train/global_step"] for h in of_kind(records, "history") if "train/grad_norm" in h["item"]]
    assert steps == [1, 2]


def test_the_table_is_in_the_run_folder_one_row_per_arm(run_output: tuple[Path, str]) -> None:
    tables = list((run_output[0] / "wandb").glob("offline-run-*/files/media/table/latency/*.table.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert table["columns"] == list(TABLE_COLUMNS)
    assert [row[:2] for row in table["data"]] == [[2, arm] for arm in ARMS]
    cached = table["columns"].index("kv_cache_in_use")
    assert [row[cached] for row in table["data"]] == [True, True, True, False]


def test_the_end_of_the_run_says_where_it_is_and_how_to_upload_it(run_output: tuple[Path, str]) -> None:
    out, printed = run_output
    run = next((out / "wandb").glob("offline-run-*"))
    flat = printed.replace("\n", "")
    assert f"upload: wandb sync {run}" in flat
    assert f"look: wandb leet {run}" in flat


def test_a_users_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"NETRC": str(tmp_path / "none")}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(tmp_path / "out")
    assert environment["WANDB_MODE"] == "offline"
    assert environment["WANDB_DIR"] == str(tmp_path / "out")
    environment |= {"WANDB_MODE": "online", "WANDB_DIR": "/elsewhere"}
    prepare_environment(tmp_path / "other")
    assert environment["WANDB_MODE"] == "online"
    assert environment["WANDB_DIR"] == "/elsewhere"


def test_with_a_key_it_stays_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WANDB_API_KEY": "0" * 40}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(tmp_path)
    assert "WANDB_MODE" not in environment


@pytest.mark.parametrize(("machine", "mode"), [("wandb.example.com", None), ("api.wandb.ai", "offline")])
def test_a_key_for_ones_own_server_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, mode: str | None
) -> None:
    (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    environment = {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://wandb.example.com"}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment(tmp_path)
    assert environment.get("WANDB_MODE") == mode


def test_without_a_run_nothing_is_logged() -> None:
    assert log_latency([], step=1) is False
    with pytest.raises(LookupError, match="no W&B run is open"):
        run_folder()


def test_a_tracker_that_raises_is_said_and_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def define_metric(self, *args: object, **kwargs: object) -> None: ...

        def log(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("the server is gone")

    import wandb

    monkeypatch.setattr(wandb, "run", Broken())
    assert log_latency([], step=1) is False
    assert "W&B did not take the latency rows (ConnectionError: the server is gone)" in caplog.text
