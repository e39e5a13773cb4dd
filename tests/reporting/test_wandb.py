"""The data that W&B got, read back from the offline file of a real run and from a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.manifest import sha256
from grpo_toolkit.cli import main
from grpo_toolkit.latency.rows.store import append_rows, read_measurements
from grpo_toolkit.reporting.trackers.metrics import BEST, HEADLINES
from grpo_toolkit.reporting.trackers.replay import offline_records
from grpo_toolkit.reporting.trackers.wandb_environment import name_run, prepare_environment
from tests.support.latency_rows import row as latency_row
from tests.support.wandb_runs import train
from tests.support.wandb_server import API_KEY, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.wandb_server import WandbServer

ARMS = ("base", "checkpoint", "export", "export_no_cache")
TIMED = [(arm, "fixed") for arm in ARMS] + [(arm, "natural") for arm in ARMS[:3]]
METRICS = (
    "ttft_ms_p50",
    "tpot_ms_p50",
    "e2e_ms_p50",
    "output_tokens_per_s_p50",
    "output_tokens_p50",
    "peak_memory_mb",
    "kv_cache_in_use",
    "first_answer_ms_p50",
    "natural_e2e_ms_p50",
    "natural_output_tokens_p50",
)
NATURAL = {f"latency/export_no_cache/natural_{metric}_p50" for metric in ("e2e_ms", "output_tokens")}
AGAINST_BASE = ("tpot_vs_base",)  # and its interval, where six rounds or more make one
NAMES = {f"latency/{arm}/{metric}" for arm in ARMS for metric in METRICS}
NAMES |= {f"latency/{arm}/{metric}" for arm in ARMS[1:] for metric in AGAINST_BASE}
NAMES -= NATURAL  # that arm has fixed answers alone
CHARTS = ("tpot", "first_token", "waterfall", "positions", "distributions", "lengths")


@pytest.fixture(scope="module")
def run_output(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training in a process of its own, so that the run is finished at its exit, as for a user."""
    out = tmp_path_factory.mktemp("wandb-run") / "out"
    done = train(qwen, out, arms=ARMS, artifact=True, natural=6, fresh=True)
    return out, done.printed


@pytest.fixture(scope="module")
def records(run_output: tuple[Path, str]) -> list[dict[str, Any]]:
    folders = list((run_output[0] / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    return offline_records(folders[0])


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def merged(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return {key: value for record in of_kind(records, kind) for key, value in record.get("update", {}).items()}


def history(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [h["item"] for h in of_kind(records, "history") if key in h["item"]]


def test_the_run_is_finished_and_offline_inside_the_output_folder(records: list[dict[str, Any]]) -> None:
    assert of_kind(records, "exit") == [{"exit_code": 0, "runtime": of_kind(records, "exit")[0]["runtime"]}]
    assert of_kind(records, "run")[0]["display_name"] == "t"


def test_every_metric_is_defined_by_name_on_the_trainers_axis_with_best_and_last(
    records: list[dict[str, Any]],
) -> None:
    found = {m["name"]: m for m in of_kind(records, "metric") if m.get("name", "").startswith("latency/")}
    assert found.keys() == NAMES | {"latency/row_ids"}
    assert {metric["step_metric"] for metric in found.values()} == {"train/global_step"}
    for name in NAMES:
        assert found[name]["summary"] == {"last": True, BEST[name.rpartition("/")[2]]: True}
        assert found[name].get("options", {}).get("hidden", False) is (name not in HEADLINES)
    assert len(HEADLINES & NAMES) == 5
    assert found["latency/row_ids"]["options"]["hidden"] is True


def test_scalars_are_one_row_at_the_last_step(run_output: tuple[Path, str], records: list[dict[str, Any]]) -> None:
    rows = history(records, "latency/export/tpot_ms_p50")
    assert len(rows) == 1
    assert rows[0]["train/global_step"] == 2
    assert {name for name in rows[0] if name.startswith("latency/")} == NAMES | {"latency/row_ids"}
    on_disk = read_measurements(run_output[0] / "latency" / "latency.jsonl")
    assert rows[0]["latency/row_ids"].split() == sorted(row.id for row in on_disk)
    assert [(row.arm, row.workload.kind) for row in on_disk] == TIMED
    for row in on_disk[4:]:
        assert row.e2e_s is not None
        assert rows[0][f"latency/{row.arm}/natural_e2e_ms_p50"] == pytest.approx(row.e2e_s.median * 1e3)
    for row in on_disk[:4]:
        assert row.tpot_s is not None
        assert rows[0][f"latency/{row.arm}/tpot_ms_p50"] == pytest.approx(row.tpot_s.median * 1e3)
        assert rows[0][f"latency/{row.arm}/peak_memory_mb"] == pytest.approx(row.memory.peak_bytes / 1e6)
        assert rows[0][f"latency/{row.arm}/kv_cache_in_use"] == (row.arm != "export_no_cache")


def test_two_runs_are_compared_by_their_config_and_summary(records: list[dict[str, Any]]) -> None:
    from grpo_toolkit.cli.shell import version

    config = merged(records, "config")
    assert config["grpo_toolkit/version"] == version()
    assert config["grpo_toolkit/trained"] == "full"
    assert "new tokens after" in config["grpo_toolkit/workload"]
    summary = merged(records, "summary")
    assert summary["latency/export/faults"] == 0
    assert summary["latency/checkpoint/faults"] > 0
    words = ("faster", "slower", "same", "cannot tell", "no interval")
    for name in ("latency/verdict", *(f"latency/export/{metric}_verdict" for metric in ("ttft", "tpot", "e2e"))):
        assert summary[name] in words


def test_a_run_that_nobody_named_gets_a_name_and_a_users_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {"WANDB_PROJECT": "mine"}
    monkeypatch.setattr(os, "environ", environment)
    name_run("tiny", "Qwen/Qwen2.5-VL-3B-Instruct")
    assert environment == {
        "WANDB_PROJECT": "mine",
        "WANDB_NAME": "tiny",
        "WANDB_RUN_GROUP": "Qwen/Qwen2.5-VL-3B-Instruct",
        "WANDB_TAGS": "grpo,grpo-toolkit",
    }


def test_the_trainers_own_rows_are_there_too(records: list[dict[str, Any]]) -> None:
    assert [row["train/global_step"] for row in history(records, "train/grad_norm")] == [1, 2]


def test_the_report_and_the_pictures_are_media_and_come_before_the_tables(records: list[dict[str, Any]]) -> None:
    items = [h["item"] for h in of_kind(records, "history")]
    order = [name.partition("._type")[0] for item in items for name in item if name.endswith("._type")]
    media = ["latency/report", *(f"latency/charts/{name}" for name in sorted(CHARTS))]
    media += [f"latency/box/{name}" for name in ("e2e_ms", "tpot_ms", "ttft_ms")]
    assert order == [*media, "latency/tpot_bar_table", "latency/positions_table", "latency/table"]
    types = {name.partition("._type")[0]: value for item in items for name, value in item.items() if "._type" in name}
    assert types["latency/report"] == "html-file"
    assert types["latency/charts/tpot"] == "image-file"
    assert types["latency/box/tpot_ms"] == "plotly-file"


def test_plots_are_presets_that_need_no_network(records: list[dict[str, Any]]) -> None:
    said = json.dumps(of_kind(records, "config"))
    for name, preset in {"latency/tpot_bar": "wandb/bar/v0", "latency/positions": "wandb/lineseries/v0"}.items():
        assert name in said
        assert preset in said


def test_the_table_is_in_the_run_folder_one_row_per_arm(run_output: tuple[Path, str]) -> None:
    tables = list((run_output[0] / "wandb").glob("offline-run-*/files/media/table/latency/table_*.table.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert table["columns"] == [
        "step", "arm", "workload", "batch_size", "use_cache", "cache_implementation", "thinking", "prompt_tokens",
        "image_tokens", "new_tokens", "rounds", "ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50", "output_tokens_per_s_p50",
        "peak_memory_mb", "kv_cache_in_use", "vision_calls", "dtype", "device", "error", "id",
    ]  # fmt: skip
    found = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["arm"], row["workload"], row["step"], row["batch_size"]) for row in found] == [
        (*timed, 2, 1) for timed in TIMED
    ]
    assert [row["use_cache"] for row in found] == [*["as in the files"] * 3, "false", *["as in the files"] * 3]
    assert [row["kv_cache_in_use"] for row in found[:4]] == [True, True, True, False]


def test_the_artifact_refers_to_the_export_without_a_copy(
    run_output: tuple[Path, str], records: list[dict[str, Any]]
) -> None:
    export = run_output[0] / "export"
    (artifact,) = [found for found in of_kind(records, "artifact") if found["type"] == "model"]
    assert sorted(artifact["aliases"]) == ["best", "latest", "step-2"]
    metadata = json.loads(artifact["metadata"])
    assert metadata["manifest_sha256"] == sha256(export / "grpo_toolkit.json")
    assert (metadata["step"], metadata["base"], metadata["findings"]) == (2, "qwen2_5_vl", [])
    assert metadata["latency"].keys() == {f"latency/export/{metric}" for metric in METRICS + AGAINST_BASE}
    entries = artifact["manifest"]["contents"]
    assert {entry["path"]: entry["ref"] for entry in entries} == {
        path.name: path.resolve().as_uri() for path in export.iterdir()
    }
    assert all("local_path" not in entry for entry in entries)


def test_the_end_of_the_run_says_where_it_is_and_how_to_upload_it(run_output: tuple[Path, str]) -> None:
    out, printed = run_output
    run = next((out / "wandb").glob("offline-run-*"))
    assert f"send: wandb sync {run}" in printed.replace("\n", "")


def test_a_copy_of_the_output_folder_uploads_its_tables_too(run_output: tuple[Path, str], tmp_path: Path) -> None:
    copy = shutil.copytree(run_output[0], tmp_path / "copy")
    away = run_output[0].rename(run_output[0].with_name("away"))
    try:
        with running() as server:
            folder = next((copy / "wandb").glob("offline-run-*"))
            sync(server, folder, tmp_path)
            name = folder.name.rpartition("-")[2]
            uploaded = [path for path in server.uploads if path.startswith(f"{name}/media/table/latency/")]
            assert len(uploaded) == 3
            assert len([row for row in server.rows(name) if "latency/export/tpot_ms_p50" in row]) == 1
    finally:
        away.rename(run_output[0])


def sync(server: WandbServer, folder: Path, home: Path) -> None:
    environment = {**os.environ, **server.environment(str(home))}
    del environment["WANDB_MODE"]
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def online(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WandbServer, Path, str]]:
    out = tmp_path_factory.mktemp("wandb-online") / "out"
    with running() as server:
        train(qwen, out, server=server, arms=("base", "export"), artifact=True)
        (name,) = server.runs
        yield server, out, name


def test_a_server_gets_one_row_per_export_its_table_and_its_media(online: tuple[WandbServer, Path, str]) -> None:
    server, _, name = online
    rows = [row for row in server.rows(name) if "latency/export/tpot_ms_p50" in row]
    assert [row["train/global_step"] for row in rows] == [2]
    summary = server.run(name)["summary"]["latency/export/tpot_ms_p50"]
    assert summary == {"last": rows[0]["latency/export/tpot_ms_p50"], "min": rows[0]["latency/export/tpot_ms_p50"]}
    (table,) = [body for path, body in server.uploads.items() if "/media/table/latency/table_" in path]
    assert [row[:2] for row in json.loads(table)["data"]] == [[2, "base"], [2, "export"]]
    assert any("/media/html/latency/report" in path for path in server.uploads)
    assert sum("/media/images/latency/charts/" in path for path in server.uploads) == 5
    assert sum("/media/plotly/latency/box/" in path for path in server.uploads) == 3


def test_a_server_gets_the_artifact_and_no_weights(online: tuple[WandbServer, Path, str]) -> None:
    server, out, name = online
    (artifact,) = [found for found in server.artifacts if found["artifactTypeName"] == "model"]
    assert artifact["artifactCollectionName"] == f"export-{name}"
    assert {alias["alias"] for alias in artifact["aliases"]} == {"step-2", "best", "latest"}
    assert json.loads(artifact["metadata"])["path"] == str((out / "export").resolve())
    assert not any("safetensors" in path for path in server.uploads)


def test_a_replay_of_what_is_there_logs_nothing(online: tuple[WandbServer, Path, str]) -> None:
    from tests.support.wandb_runs import replay

    server, out, name = online
    before = len(server.rows(name))
    said = replay(out, server)
    assert (said["run"], said["logged"], said["there"]) == (name, 0, 1)
    assert len(server.rows(name)) == before


def test_leet_shows_the_charts_in_a_terminal(run_output: tuple[Path, str]) -> None:
    import pty
    import select
    import time

    folder = next((run_output[0] / "wandb").glob("offline-run-*"))
    process, terminal = pty.fork()
    if process == 0:
        environment = {**os.environ, "TERM": "xterm-256color", "LINES": "60", "COLUMNS": "200"}
        os.execve(sys.executable, [sys.executable, "-m", "wandb", "leet", str(folder)], environment)
    seen, until = b"", time.monotonic() + 30
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        while time.monotonic() < until and b"tpot_ms_p50" not in seen:
            if select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 65536)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    assert b"tpot_ms_p50" in seen


def test_a_users_settings_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"NETRC": str(tmp_path / "none")}
    monkeypatch.setattr(os, "environ", environment)
    assert prepare_environment(tmp_path / "out") is None
    assert environment == {
        "NETRC": str(tmp_path / "none"),
        "WANDB_DIR": str(tmp_path / "out"),
        "WANDB_DATA_DIR": str(tmp_path / "out" / "wandb" / "data"),
        "WANDB_ALLOW_OFFLINE_ARTIFACTS": "false",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.5",
        "WANDB_HTTP_TIMEOUT": "5",
        "WANDB_INIT_TIMEOUT": "20",
        "WANDB_FINISH_TIMEOUT": "30",
        "WANDB_MODE": "offline",
    }
    mine = dict.fromkeys(environment, "mine")
    environment |= mine
    prepare_environment(tmp_path / "other")
    assert environment == mine


def test_with_a_key_and_a_server_that_answers_it_stays_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
        monkeypatch.setattr(os, "environ", environment)
        assert prepare_environment(tmp_path) is None
        assert "WANDB_MODE" not in environment
        assert server.calls["Viewer"] == 1


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("500", "it says 500"),
        ("403", "it says 403"),
        ("nothing", "no answer within 1.5 s"),
        ("late", "no answer within 1.5 s"),
        ("half", "its answer is cut off (RemoteProtocolError)"),
        ("dead", "it cannot be reached ([Errno 111] Connection refused)"),
    ],
)
def test_a_server_that_does_not_work_is_offline_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, problem: str
) -> None:
    with running() as server:
        server.behave(mode)
        environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
        monkeypatch.setattr(os, "environ", environment)
        assert prepare_environment(tmp_path) == problem
        assert environment["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(("machine", "is_asked"), [("127.0.0.1", True), ("api.wandb.ai", False)])
def test_a_key_for_ones_own_server_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, is_asked: bool
) -> None:
    (tmp_path / "netrc").write_text(f"machine {machine}\n  login user\n  password {API_KEY}\n")
    with running() as server:
        environment = {"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": server.url}
        monkeypatch.setattr(os, "environ", environment)
        prepare_environment(tmp_path)
        assert environment.get("WANDB_MODE") == (None if is_asked else "offline")
        assert server.calls["Viewer"] == int(is_asked)


def test_an_address_that_is_none_is_offline_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": "rubbish"})
    assert prepare_environment(tmp_path) == "WANDB_BASE_URL is 'rubbish', which is no address"


@pytest.mark.parametrize(("answers", "seconds"), [(True, 4.5), (False, 1.0)])
def test_who_asks_for_online_gets_it_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool, seconds: float
) -> None:
    with running() as server:
        server.behave("well" if answers else "nothing")
        environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        monkeypatch.setattr(os, "environ", environment)
        problem = prepare_environment(tmp_path, patience_s=2.5, spare_s=2.0)
        assert problem == (None if answers else "no answer within 1.5 s")
        assert environment["WANDB_MODE"] == "online"
        assert float(environment["WANDB_INIT_TIMEOUT"]) == pytest.approx(seconds, abs=0.4)


@pytest.mark.parametrize(
    ("variable", "message"),
    [(None, "W&B is not installed: pip install wandb"), ("disabled", "WANDB_MODE is disabled, so nothing would be")],
)
def test_a_replay_that_cannot_log_is_one_line(
    variable: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    append_rows(tmp_path / "latency.jsonl", [latency_row("base")])
    if variable is None:
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert main(["report", str(tmp_path), "--replay", "wandb"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_is_timed_between_steps_is_a_row_at_its_step(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(qwen, out, arms=("base",), every_steps=1)
    found = offline_records(next((out / "wandb").glob("offline-run-*")))
    live = [(row["train/global_step"], "train/loss" in row) for row in history(found, "latency/live/tpot_ms_p50")]
    assert live == [(1, False), (2, False)]
    (base,) = history(found, "latency/base/tpot_ms_p50")
    assert base["train/global_step"] == 2
    assert "latency/live/tpot_ms_p50" not in base
    on_disk = read_measurements(out / "latency" / "latency.jsonl")
    assert [(row.step, row.arm) for row in on_disk] == [(1, "live"), (2, "live"), (2, "base")]
    assert base["latency/row_ids"].split() == sorted(row.id for row in on_disk)
