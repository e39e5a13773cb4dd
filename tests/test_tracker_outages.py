"""A tracker that fails in any way costs a training nothing but one warning, and every row is restored afterwards."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.latency.store import read_measurements
from grpo_toolkit.tracking.breaker import BUDGET_S, Breaker
from grpo_toolkit.tracking.replay import offline_records
from grpo_toolkit.tracking.wandb_environment import PROBE_S
from wandb_runs import replay, train
from wandb_server import WandbServer, running

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def weights(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same training without a tracker and without our latency callback."""
    trained = train(qwen, tmp_path_factory.mktemp("plain") / "out", arms=(), report_to="none")
    return str(trained.facts["weights"])


def restored(server: WandbServer, out: Path, name: str) -> None:
    """Every row on disk is in the run once, and so is the table."""
    on_disk = {row.id for row in read_measurements(out / "latency" / "latency.jsonl")}
    rows = [row for row in server.rows(name) if "latency/row_ids" in row]
    assert [set(row["latency/row_ids"].split()) for row in rows] == [on_disk]
    assert set(server.run(name)["summary"]["latency/table_row_ids"].split()) == on_disk
    assert sum("/media/table/latency/table_" in path for path in server.uploads) == 1


@pytest.mark.parametrize(
    "mode",
    ["nothing", "dead", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("500", "403", "half", "late"))],
)
def test_a_server_that_fails_from_the_start(qwen: Path, tmp_path: Path, weights: str, mode: str) -> None:
    out = tmp_path / "out"
    with running() as server:
        server.behave(mode)
        trained = train(qwen, out, server=server)
        assert trained.facts["weights"] == weights
        assert trained.facts["failures"] == []
        assert sum(trained.facts["waited_s"].values()) + PROBE_S <= 5
        assert trained.printed.count("the W&B server does not work") == 1
        server.behave("well")
        assert server.runs == {}
        said = replay(out, server)
        assert (said["logged"], said["there"]) == (1, 0)
        restored(server, out, said["run"])
        assert replay(out, server)["logged"] == 0
        restored(server, out, said["run"])


@pytest.mark.parametrize("mode", ["500", "403", "nothing", "half", "late", "dead"])
@pytest.mark.slow
def test_a_server_that_fails_in_the_middle(qwen: Path, tmp_path: Path, weights: str, mode: str) -> None:
    out = tmp_path / "out"
    with running() as server:
        trained = train(qwen, out, server=server, on_step=mode)
        assert trained.facts["weights"] == weights
        assert trained.facts["failures"] == []
        assert sum(trained.facts["waited_s"].values()) <= 5
        assert trained.printed.count("W&B did not take all of it") <= 1
        (name,) = server.runs
        server.behave("well")
        said = replay(out, server)
        assert said["run"] == name
        restored(server, out, name)
        assert replay(out, server)["logged"] == 0


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
    assert trained.printed.count("upload: wandb sync") == 1


def test_without_a_tracker_it_is_files_only_and_said_once(qwen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = train(qwen, out, report_to="none")
    assert trained.printed.count("no W&B, Trackio or TensorBoard run is open here") == 1
    assert sorted(path.name for path in (out / "latency").iterdir()) == [
        "findings.json",
        "latency.jsonl",
        "pictures",
        "report.html",
    ]
    assert not (out / "wandb").exists()


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


def test_all_classes_together_keep_within_the_budget() -> None:
    breaker = Breaker(budget_s=0.3, call_s=0.2)
    forever, calls = threading.Event(), []
    assert not breaker.call("tables", forever.wait)
    assert not breaker.call("artifacts", forever.wait)
    assert not breaker.call("media", lambda: calls.append("media"))
    assert calls == []
    assert breaker.problems["media"] == "the 0.3 s for trackers are used up"
    assert BUDGET_S <= 5
    forever.set()


def test_calls_that_come_back_at_once_use_nothing_up() -> None:
    breaker = Breaker(budget_s=0.3)
    assert all(breaker.call("scalars", lambda: None) for _ in range(200))
    assert breaker.waited_s == 0


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
