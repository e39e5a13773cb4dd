"""The number of requests in a measurement: warm-up, rounds and budget, on engines with given times."""

from __future__ import annotations

import time
from collections import Counter
from itertools import cycle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit import LatencyCallback
from grpo_toolkit.callbacks import latency_budget
from grpo_toolkit.callbacks.latency_budget import Budget
from grpo_toolkit.errors import UnsupportedError, WorkerError
from grpo_toolkit.latency.bench.measure import Plan, measure_latency
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.process import ProcessEngine
from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Options
from grpo_toolkit.latency.rows.row import Proof
from grpo_toolkit.latency.rows.timeline import Timeline
from grpo_toolkit.model.generation.request import Request
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NOISY = tuple(1.3**turn for turn in range(60))  # no two windows agree
FIXED = traffic_of([Request(messages=[{"role": "user", "content": "?"}])], max_new_tokens=2)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class ScriptedEngine:
    """An engine that answers in given seconds, on a clock that nothing else moves."""

    def __init__(
        self, clock: Clock, seconds: Sequence[float], *, load_s: float = 0.0, broken: str | None = None
    ) -> None:
        self.clock, self.seconds, self.load_s, self.broken = clock, cycle(seconds), load_s, broken

    def facts(self) -> EngineFacts:
        self.clock.now += self.load_s
        return EngineFacts()

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        if self.broken is not None and options.sdpa_backend == self.broken:
            raise UnsupportedError("no kernel")
        spent = next(self.seconds)
        self.clock.now += spent
        return Answer(
            timeline=Timeline(
                token_times_s=[spent / 2, spent], prompt_tokens=1, output_tokens=2, output_lengths=[2], phases_s={}
            ),
            tokens=[[1, 2]],
            texts=[""],
        )

    def prove(self, requests: Sequence[Request], options: Options) -> Evidence:
        self.clock.now += 1.0
        return Evidence(proof=Proof())

    def environment(self) -> dict[str, str]:
        return {}

    def probe_hardware(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("grpo_toolkit.latency.bench.measure.time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def scripted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedEngine]:
    """Engines by the address of their arm."""
    engines: dict[str, ScriptedEngine] = {}
    monkeypatch.setattr("grpo_toolkit.latency.engines.pool.open_engine", lambda arm: engines[arm.url])
    return engines


def asked(arms: Sequence[Arm], engines: Engines, **settings: Any) -> dict[str, tuple[int, int]]:
    """Requests by arm: to warm up, and timed."""
    count: Counter[tuple[str, bool]] = Counter()
    measure_latency(
        arms,
        FIXED,
        engines=engines,
        progress=lambda name, turn, _: count.update([(name, turn < 0)]),
        **{"rounds": 6, **settings},
    )
    return {arm.name: (count[arm.name, True], count[arm.name, False]) for arm in arms}


def test_warm_up_goes_on_until_the_times_agree_ten_at_most(clock: Clock, scripted: dict[str, ScriptedEngine]) -> None:
    scripted |= {"steady": ScriptedEngine(clock, [1.0]), "noisy": ScriptedEngine(clock, NOISY)}
    arms = [Arm(name="steady", url="steady"), Arm(name="noisy", url="noisy")]
    assert asked(arms, Engines()) == {"steady": (6, 6), "noisy": (10, 6)}


def test_a_process_that_answered_before_warms_up_with_two(clock: Clock, scripted: dict[str, ScriptedEngine]) -> None:
    scripted |= {"base": ScriptedEngine(clock, NOISY), "export": ScriptedEngine(clock, NOISY)}
    export = Arm(name="export", url="export")
    arms = [Arm(name="base", url="base"), export, Arm(name="no_cache", url="export", options=Options(use_cache=False))]
    engines = Engines()
    assert asked(arms, engines) == {"base": (10, 6), "export": (10, 6), "no_cache": (2, 6)}
    assert asked(arms, engines) == {"base": (2, 6), "export": (2, 6), "no_cache": (2, 6)}
    assert asked(arms, engines, warmup=3, rounds=1) == {"base": (3, 1), "export": (3, 1), "no_cache": (3, 1)}


def test_what_is_compiled_warms_up_by_itself(clock: Clock, scripted: dict[str, ScriptedEngine]) -> None:
    scripted["export"] = ScriptedEngine(clock, NOISY)
    compiled = Options(cache_implementation="static", compiled=True)
    arms = [Arm(name="eager", url="export"), Arm(name="compiled", url="export", options=compiled)]
    engines = Engines()
    assert asked(arms, engines) == {"eager": (10, 6), "compiled": (10, 6)}
    assert asked(arms, engines) == {"eager": (2, 6), "compiled": (2, 6)}


def test_the_next_arm_of_a_process_warms_it_up_where_the_first_fails(
    clock: Clock, scripted: dict[str, ScriptedEngine]
) -> None:
    scripted["export"] = ScriptedEngine(clock, NOISY, broken="cudnn")
    arms = [
        Arm(name="cudnn", url="export", options=Options(sdpa_backend="cudnn")),
        Arm(name="math", url="export", options=Options(sdpa_backend="math")),
        Arm(name="flash", url="export", options=Options(sdpa_backend="flash")),
    ]
    assert asked(arms, Engines()) == {"cudnn": (0, 0), "math": (10, 6), "flash": (2, 6)}


@pytest.mark.parametrize(
    ("budget_s", "rounds", "expected"),
    [
        (None, 20, (10, 20)),
        (0.0, 20, (2, 6)),  # the least, and no verdict with less
        (0.0, 3, (2, 3)),
        (60.0, 20, (5, 8)),  # late after 21 s of warm-up; the block that ends at 61 s is the last
        (1e9, 20, (10, 20)),  # the rounds asked for are the most
    ],
)
def test_a_budget_is_for_warm_up_and_rounds_together(
    clock: Clock, scripted: dict[str, ScriptedEngine], budget_s: float | None, rounds: int, expected: tuple[int, int]
) -> None:
    scripted["one"] = ScriptedEngine(clock, (1.0, 9.0, 1.0, 9.0), load_s=1000.0)
    assert asked([Arm(name="one", url="one")], Engines(), budget_s=budget_s, rounds=rounds) == {"one": expected}


def test_loading_is_not_counted_as_asking(clock: Clock, scripted: dict[str, ScriptedEngine]) -> None:
    scripted["one"] = ScriptedEngine(clock, [2.0], load_s=1000.0)
    engines = Engines()
    asked([Arm(name="one", url="one")], engines)
    assert engines.asked_s == 6 * 2.0 + 6 * 2.0 + 1.0  # warm-up, rounds, and the proof
    asked([Arm(name="one", url="one")], engines)
    assert engines.asked_s == 25.0 + 2 * 2.0 + 6 * 2.0 + 1.0


def test_the_workloads_of_a_callback_share_one_budget_and_ask_no_more_than_the_least_beyond_it(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count: Counter[str] = Counter()
    shares: list[tuple[float, float]] = []
    ask, prove, measured = ProcessEngine.ask, ProcessEngine.prove, Plan.measured

    def counted_ask(self: ProcessEngine, *args: Any) -> Any:
        count["ask"] += 1
        return ask(self, *args)

    def counted_prove(self: ProcessEngine, *args: Any) -> Any:
        count["prove"] += 1
        return prove(self, *args)

    def seen_measured(self: Plan, engines: Any) -> Any:
        shares.append((self.budget_s or 0.0, engines.asked_s))
        return measured(self, engines)

    monkeypatch.setattr(ProcessEngine, "ask", counted_ask)
    monkeypatch.setattr(ProcessEngine, "prove", counted_prove)
    monkeypatch.setattr(latency_budget, "SMOKE_BUDGET_S", latency_budget.LEAST_BUDGET_S)
    monkeypatch.setattr(latency_budget, "SMOKE_ROUNDS", latency_budget.MIN_PAIRS)
    monkeypatch.setattr(Plan, "measured", seen_measured)
    timing = LatencyCallback(arms=["base", "checkpoint"], new_tokens=3, max_new_tokens=4, strict=True)
    trainer = grpo_trainer(qwen, tmp_path / "a_minute", [timing])
    trainer.train()
    (first, before), (second, spent) = shares
    assert (first, before) == (30.0, 0.0)
    assert second == 60.0 - spent
    said = "timing      base, checkpoint in turns, about 60 s\n"
    assert said in capsys.readouterr().err

    monkeypatch.setattr(latency_budget, "LEAST_BUDGET_S", 0.0)
    count.clear()
    trainer = grpo_trainer(qwen, tmp_path / "nothing", [timing])
    trainer.train()
    assert count == {"ask": 2 * 2 * (2 + 6), "prove": 2 * 2}
    assert [row.rounds for row in timing.rows] == [6] * 4

    # A smoke run whose few seconds are used up: one workload, two rounds, and a line that says so.
    monkeypatch.setattr(latency_budget, "LEAST_BUDGET_S", 1e9)
    monkeypatch.setattr(latency_budget, "SMOKE_BUDGET_S", 0.0)
    monkeypatch.setattr(latency_budget, "SMOKE_ROUNDS", 2)
    monkeypatch.setattr(Budget, "training_s", 0.0)
    count.clear()
    capsys.readouterr()
    trainer = grpo_trainer(qwen, tmp_path / "smoke", [timing])
    trainer.train()
    assert count == {"ask": 2 * (2 + 2), "prove": 2}
    assert [row.rounds for row in timing.rows] == [2] * 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert [line.split()[2] for line in told] == ["fixed", "natural"]


def test_a_question_that_fails_leaves_the_report_of_those_before_it(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(rows: Any) -> None:
        raise WorkerError("the process is gone")

    monkeypatch.setattr(latency_budget, "compare_rows", gone)
    timing = LatencyCallback(arms=["base"], new_tokens=2, max_new_tokens=2, rounds=1)
    grpo_trainer(qwen, tmp_path, [timing]).train()
    assert [row.workload.kind for row in timing.rows] == ["fixed"]
    assert (tmp_path / "latency" / "report.html").is_file()
    assert timing.failures == ["the latency measurement failed: WorkerError: the process is gone"]
    assert "left out    natural answers: the process is gone\n" in capsys.readouterr().err


def test_what_the_end_has_taken_so_far_counts_but_a_minute_of_asking_is_left() -> None:
    ended = time.perf_counter() - 20.0  # saving and loading
    assert Budget(began=ended - 3 * 3600.0, ended=ended).left_s(0.0) == pytest.approx(108.0 - 20.0, abs=1.0)
    short = Budget(began=ended - 600.0, ended=ended)  # six seconds would be one percent
    assert short.left_s(5.0) == 55.0
    assert short.left_s(61.0) == 0.0
    assert short.least_rounds == 6


@pytest.mark.parametrize(("training_s", "least_s"), [(3.0, 20.0), (38.0, 38.0), (59.0, 59.0)])
def test_a_smoke_run_is_timed_no_longer_than_it_took(training_s: float, least_s: float) -> None:
    ended = time.perf_counter()
    budget = Budget(began=ended - training_s, ended=ended)
    assert budget.least_s == pytest.approx(least_s)
    assert budget.least_rounds == 2
