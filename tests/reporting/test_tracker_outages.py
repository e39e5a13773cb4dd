"""A tracker that fails in any way costs a training nothing but one warning, and every row is restored afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.latency.rows.store import read_measurements
from grpo_toolkit.reporting.trackers.bounded_calls import BUDGET_S, Breaker, Budget
from grpo_toolkit.reporting.trackers.mirror import Mirror
from grpo_toolkit.reporting.trackers.replay import offline_records
from grpo_toolkit.reporting.trackers.wandb_exit import EXIT_S, bound_exit
from tests.support.wandb_runs import environment, replay, train
from tests.support.wandb_server import WandbServer, running

if TYPE_CHECKING:
    from pathlib import Path


BUSY_S = 1.0
"""What a machine with other work may add to a wait."""


@pytest.fixture(scope="module")
def weights(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the same training without a tracker and without our latency callback."""
    trained = train(qwen, tmp_path_factory.mktemp("plain") / "out", arms=(), report_to="none", fresh=True)
    return str(trained.facts["weights"])


def restored(server: WandbServer, out: Path, name: str) -> None:
    """Check that every row on disk is in the run once, and so is the table."""
    on_disk = {row.id for row in read_measurements(out / "latency" / "latency.jsonl")}
    rows = [row for row in server.rows(name) if "latency/row_ids" in row]
    assert [set(row["latency/row_ids"].split()) for row in rows] == [on_disk]
    assert set(server.run(name)["summary"]["latency/table_row_ids"].split()) == on_disk
    assert sum("/media/table/latency/table_" in path for path in server.uploads) == 1


# A server fails in six ways, at three times of a training; each is met at two of them at least.
@pytest.mark.parametrize("mode", ["nothing", "dead", "half", "late"])
def test_a_server_that_fails_from_the_start(qwen: Path, tmp_path: Path, weights: str, mode: str) -> None:
    out = tmp_path / "out"
    with running() as server:
        server.behave(mode)
        trained = train(qwen, out, server=server, fresh=mode == "nothing")
        assert trained.facts["weights"] == weights
        assert trained.facts["failures"] == []
        assert trained.facts["spent_s"] <= BUDGET_S
        assert trained.printed.count("the W&B server does not work") == 1
        server.behave("well")
        assert server.runs == {}
        said = replay(out, server)
        assert (said["logged"], said["there"]) == (1, 0)
        restored(server, out, said["run"])
        assert replay(out, server)["logged"] == 0
        restored(server, out, said["run"])


@pytest.mark.parametrize(
    ("mode", "is_asked_for"),
    [
        pytest.param("dead", False, id="dead after it was asked"),
        pytest.param("403", False, id="403 after it was asked"),
        pytest.param("nothing", True, id="nothing, asked for by the user"),
        pytest.param("500", True, id="500, asked for by the user"),
    ],
)
def test_a_run_that_does_not_open_is_opened_offline(
    qwen: Path, tmp_path: Path, weights: str, mode: str, is_asked_for: bool
) -> None:
    """The server fails between our question and `wandb.init`, or from the start with WANDB_MODE=online."""
    out = tmp_path / "out"
    with running() as server:
        if is_asked_for:
            server.behave(mode)
            trained = train(qwen, out, server=server, variables={"WANDB_MODE": "online"})
        else:
            trained = train(qwen, out, server=server, on_init=mode)
        assert trained.facts["weights"] == weights
        assert trained.facts["failures"] == []
        assert trained.facts["spent_s"] <= BUDGET_S + EXIT_S + BUSY_S  # its end, offline, takes no time
        assert trained.printed.count("the W&B server does not work") == 1
        assert (
            trained.printed.count("this run is offline, in the output folder, and `wandb sync` uploads it later") == 1
        )
        assert trained.printed.count("W&B did not take all of it") == 0
        assert trained.printed.count("Traceback") == 0
        assert server.runs == {}
        (folder,) = (out / "wandb").glob("offline-run-*")
        items = [r["history"]["item"] for r in offline_records(folder) if r["type"] == "history"]
        assert sum("train/loss" in item for item in items) == 2
        assert sum("latency/row_ids" in item for item in items) == 1
        server.behave("well")
        said = replay(out, server)
        assert (said["logged"], said["there"]) == (1, 0)
        restored(server, out, said["run"])


def test_a_key_that_nobody_has_is_offline_too(qwen: Path, tmp_path: Path, weights: str) -> None:
    trained = train(qwen, tmp_path / "out", variables={"WANDB_MODE": "online"})
    assert trained.facts["weights"] == weights
    assert trained.printed.count("this run is offline, in the output folder, and `wandb sync` uploads it later") == 1
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 1


def test_the_trainers_own_callback_rests_after_an_early_finish(qwen: Path, tmp_path: Path, weights: str) -> None:
    """`WandbCallback.on_log` raises when the run is gone: into the training, if it were not sheltered."""
    out = tmp_path / "out"
    trained = train(qwen, out, finish_early=True)
    assert trained.facts["weights"] == weights
    assert trained.facts["failures"] == []
    assert trained.printed.count("W&B failed (") == 1
    assert trained.printed.count(f"later: grpo-toolkit report {out}/latency --replay wandb") == 1
    assert trained.printed.count("W&B did not take all of it") == 0
    said = replay(out, None)
    assert (said["logged"], said["there"]) == (1, 0)


@pytest.mark.parametrize("mode", ["500", "403", "half", "late", "dead"])
@pytest.mark.slow
def test_a_server_that_fails_in_the_middle(qwen: Path, tmp_path: Path, weights: str, mode: str) -> None:
    out = tmp_path / "out"
    with running() as server:
        trained = train(qwen, out, server=server, on_step=mode, fresh=mode == "dead")
        assert trained.facts["weights"] == weights
        assert trained.facts["failures"] == []
        assert trained.facts["spent_s"] <= BUDGET_S + BUSY_S
        assert trained.printed.count("W&B did not take all of it") <= 1
        assert trained.exit_s is not None
        assert trained.exit_s < 25  # 30 s and more where nothing ends W&B's service, whatever else a machine does
        if mode == "dead":
            assert trained.printed.count("what it did not get is on disk") == 1
        (name,) = server.runs
        server.behave("well")
        said = replay(out, server)
        assert said["run"] == name
        restored(server, out, name)
        assert replay(out, server)["logged"] == 0


TABLES = """
import json, sys, urllib.request, wandb
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker
from grpo_toolkit.reporting.trackers.sheltered_callbacks import shelter_tables
run = wandb.init(project="huggingface")
breaker = Breaker()
shelter_tables(breaker)
wandb.log({"loss": 1.0})
urllib.request.urlopen(sys.argv[1] + "/behave/403", b"", timeout=10).read()
for _ in range(2):
    wandb.log({"completions": wandb.Table(columns=["a"], data=[[2]])})
wandb.log({"loss": 2.0})
print(json.dumps(breaker.problems))
"""


def test_a_table_of_the_trainers_own_does_not_end_the_training(tmp_path: Path) -> None:
    """TRL logs completions from `Trainer.log`: where the server is gone before the first, W&B raises from there."""
    with running() as server:
        done = subprocess.run(
            [sys.executable, "-c", TABLES, server.url],
            env=environment(tmp_path, server) | {"WANDB_DIR": str(tmp_path), "WANDB_FINISH_TIMEOUT": "2"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "AuthenticationError" in json.loads(done.stdout.splitlines()[-1])["tables"], done.stderr[-2000:]


@pytest.mark.slow
def test_a_short_end_loses_nothing_that_wandb_had_not_uploaded(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running() as server:
        trained = train(qwen, out, server=server, on_step="dead")
        assert trained.printed.count("what it did not get is on disk") == 1
        assert trained.printed.count("socket.send()") == 0
        (folder,) = (out / "wandb").glob("run-*")
        assert f"wandb sync --include-online {folder}" in trained.printed
        assert [r["type"] for r in offline_records(folder)].count("exit") == 1
        server.behave("well")
        (name,) = server.runs
        assert not server.run(name)["done"]
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(folder)]
        subprocess.run(command, env=environment(tmp_path, server), check=True, capture_output=True, timeout=120)
        on_disk = {row.id for row in read_measurements(out / "latency" / "latency.jsonl")}
        # A sync sends all rows behind those that had arrived, these once more where a slow training left W&B the time
        # for its first upload: a row is known by its `_step`, and is the same both times.
        sent = server.rows(name)
        rows = {row["_step"]: row for row in sent}
        assert all(row == rows[row["_step"]] for row in sent)
        assert [row["train/global_step"] for row in rows.values() if "train/loss" in row] == [1, 2]
        (row,) = [row for row in rows.values() if "latency/row_ids" in row]
        assert set(row["latency/row_ids"].split()) == on_disk
        assert server.run(name)["done"]


def test_where_the_user_set_how_long_wandb_waits_the_end_is_wandbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "12")
    assert not bound_exit(None)


def test_a_kill_loses_no_measured_row(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(qwen, out, kill=True)
    (row,) = read_measurements(out / "latency" / "latency.jsonl")
    folder = next((out / "wandb").glob("offline-run-*"))
    arrived = [r for r in offline_records(folder) if "latency/row_ids" in r.get("history", {}).get("item", {})]
    said = replay(out, None)
    assert (said["logged"], said["there"]) == ((0, 1) if arrived else (1, 0))
    records = [r for place in (out / "wandb").glob("offline-run-*") for r in offline_records(place)]
    items = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [item["latency/row_ids"] for item in items if "latency/row_ids" in item] == [row.id]
    assert replay(out, None)["logged"] == 0


def test_a_run_that_was_finished_early_is_left_alone(qwen: Path, tmp_path: Path, weights: str) -> None:
    out = tmp_path / "out"
    trained = train(qwen, out, finish_early=True, report_to="none", wandb_by_hand=True)
    assert trained.facts["weights"] == weights
    assert trained.facts["failures"] == []
    assert trained.printed.count("the run was finished before training ended") == 1
    said = replay(out, None)
    assert (said["logged"], said["there"]) == (1, 0)


def test_two_processes_log_once(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = train(qwen, out, processes=2)
    assert trained.facts["processes"] == 2
    (row,) = read_measurements(out / "latency" / "latency.jsonl")
    (folder,) = (out / "wandb").glob("offline-run-*")
    items = [r["history"]["item"] for r in offline_records(folder) if r["type"] == "history"]
    assert [item["latency/row_ids"] for item in items if "latency/row_ids" in item] == [row.id]
    assert trained.printed.count("send: wandb sync") == 1


def test_without_a_tracker_it_is_files_only_and_said_once(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = train(qwen, out, report_to="none")
    assert trained.printed.count("no W&B, Trackio or TensorBoard run is open") == 1
    assert sorted(path.name for path in (out / "latency").iterdir()) == [
        "findings.json",
        "latency.jsonl",
        "pictures",
        "report.html",
    ]
    assert not (out / "wandb").exists()


def test_a_trackers_callback_rests_where_ours_is_and_raises_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import TensorBoardCallback

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "runs"))
    ours, theirs = (TrainingArguments(output_dir=tmp_path / "out", report_to=["tensorboard"]) for _ in range(2))
    mirror, state, control = Mirror(), TrainerState(), TrainerControl()
    mirror.prepare(ours)
    callback = TensorBoardCallback()
    callback.on_train_begin(ours, state, control)
    callback.on_log(ours, state, control, logs={"loss": 1.0})
    callback.on_train_end(ours, state, control)
    (said,) = caplog.messages
    assert said.startswith("grpo_toolkit: TensorBoard failed (NotADirectoryError: ")
    assert said.endswith("; training goes on without it; every latency row is on disk")
    assert mirror.budget.spent_s > 0
    with pytest.raises(NotADirectoryError):
        TensorBoardCallback().on_train_begin(theirs, state, control)


def test_a_class_that_hangs_rests_and_the_others_go_on() -> None:
    breaker = Breaker(call_s=0.05)
    forever, calls = threading.Event(), []
    assert not breaker.call("scalars", forever.wait)
    assert not breaker.call("scalars", lambda: calls.append("scalars"))
    assert breaker.call("media", lambda: calls.append("media"))
    assert calls == ["media"]
    assert breaker.news() == "scalars: no answer within 0.1 s"
    assert breaker.news() is None
    forever.set()


def test_all_trackers_and_classes_share_one_budget() -> None:
    budget = Budget(0.3)
    one, other = Breaker(budget, call_s=0.2), Breaker(budget, call_s=0.2)
    forever, calls = threading.Event(), []
    assert not one.call("tables", forever.wait)
    assert budget.spent_s >= 0.2
    assert not other.call("artifacts", forever.wait)
    assert budget.spent_s >= 0.3
    assert not other.call("media", lambda: calls.append("media"))
    assert not one.call("media", lambda: calls.append("media"))
    assert calls == []
    assert other.problems["media"] == one.problems["media"] == "the 0.3 s for trackers are used up"
    forever.set()


def test_a_trackers_last_call_gets_what_the_others_left() -> None:
    budget = Budget(10.0)
    budget.spend(9.95)
    forever = threading.Event()
    assert not Breaker(budget, call_s=2.0).call("tables", forever.wait)
    assert 10.0 <= budget.spent_s < 12.0
    forever.set()


def test_the_training_and_its_end_keep_what_is_promised() -> None:
    assert BUDGET_S + EXIT_S <= 5
    mirror = Mirror()
    assert {id(breaker.budget) for breaker in mirror.breakers.values()} == {id(mirror.budget)}
    assert mirror.budget.limit_s == BUDGET_S


def test_calls_that_come_back_at_once_use_nothing_up() -> None:
    breaker = Breaker(Budget(0.3))
    assert all(breaker.call("scalars", lambda: None) for _ in range(200))
    assert breaker.budget.spent_s == 0


@pytest.mark.parametrize("error", [ConnectionError("gone\nfor good"), SystemExit(3), OSError(28, "No space left")])
def test_whatever_a_tracker_raises_stays_inside(error: BaseException) -> None:
    def raises() -> None:
        raise error

    breaker = Breaker()
    assert not breaker.call("tables", raises)
    assert breaker.problems == {"tables": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def test_a_call_sees_the_callers_context() -> None:
    import contextvars

    current = contextvars.ContextVar("current", default="nobody")
    current.set("me")
    seen: list[str] = []
    assert Breaker().call("media", lambda: seen.append(current.get()))
    assert seen == ["me"]
