"""Batch sizes: what they bring, what they cost, how many fit, and how many are tried."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.latency.bench.batches import _Trials, batches_of, batches_of_rows, time_batches
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import FREE_MEMORY, Engine
from grpo_toolkit.latency.rows.review import Review
from grpo_toolkit.latency.rows.row import Memory, Workload
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.reporting.terminal.two_questions import batch_parts
from tests.support.latency_rows import batch_sweep, row, timeline

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.row import LatencyRow


TRAFFIC = traffic_of([Request(messages=[{"role": "user", "content": "What?"}])], max_new_tokens=4)


def point(size: int, tpot_s: float, *, on_gpu: bool = True, **changes: Any) -> LatencyRow:
    memory = Memory(
        peak_allocated_bytes=7_000_000_000 + 200_000_000 * size if on_gpu else None,
        kv_bytes=size * 575 * 37_000,
        free_bytes=20_000_000_000,
    )
    workload = Workload(
        name=f"fixed_batch_size_{size}", requests=12, prompt_tokens=512, max_new_tokens=64, batch_size=size
    )
    lines = [timeline(tpot_s, index) for index in range(12)]
    tpots = row("export", timelines=lines).tpot_s
    assert tpots is not None
    found = row(
        "export", session="batches", tag=f"{size}", timelines=lines, memory=memory, workload=workload, ratios=[]
    )
    return replace(found, tpot_s=replace(tpots, median=tpot_s), **changes)


def test_the_largest_batch_in_words_on_a_gpu() -> None:
    batches = batches_of([point(16, 0.024), point(1, 0.02), point(4, 0.021)])
    assert batches is not None
    assert [found.size for found in batches.points] == [1, 4, 16]
    assert batches.sequence_bytes == 200_000_000
    assert batches.fits == 1 + 90  # 90% of 20 GB, at 200 MB a sequence
    assert batches.kv_bytes_per_token == pytest.approx(37_000)
    assert batch_parts(batches) == [
        "batch 16: 13.3 times the tokens a second at 1.20 times the time per token (1.20 to 1.20)",
        "3.0 GB more",
        "a sequence of 1,000 tokens costs 37 MB",
        "about 91 sequences of 576 tokens fit",
    ]


def test_on_a_cpu_memory_is_the_bytes_of_the_cache() -> None:
    batches = batches_of([point(1, 0.02, on_gpu=False), point(4, 0.05, on_gpu=False)])
    assert batches is not None
    assert batches.sequence_bytes == 575 * 37_000
    assert batch_parts(batches)[1:] == [
        "64 MB more in its KV cache",
        "a sequence of 1,000 tokens costs 37 MB",
        "about 847 sequences of 576 tokens fit by their cache",
    ]


def test_one_size_says_nothing_and_one_out_of_memory_bounds_what_fits() -> None:
    assert batches_of([point(1, 0.02)]) is None
    failed = point(32, 0.03, error="out of memory")
    batches = batches_of([point(1, 0.02), point(16, 0.024), failed])
    assert batches is not None
    assert batches.fits == 31
    assert "batch 32 ran out of memory" in batch_parts(batches)


def test_sizes_of_sessions_of_their_own_are_told_without_an_interval(tmp_path: Path) -> None:
    rows = [replace(found, session=f"size {found.workload.batch_size}") for found in batch_sweep()]
    batches = batches_of_rows(rows)
    assert batches is not None
    assert batches.arm == "export"
    assert batches.ratio is None
    assert batch_parts(batches)[0] == ("batch 16: 10.0 times the tokens a second at 1.60 times the time per token")
    turned = [point(1, 0.02), point(4, 0.021)]
    assert [found.workload.batch_size for found in Review(path=tmp_path, rows=turned).batches] == [1, 4]


@pytest.mark.parametrize(
    ("peaks", "free", "budget_s", "expected"),
    [
        ({1: 10, 4: 40, 16: 160}, "1000", 1e6, [64, 32]),  # 1 + 90 sequences
        ({1: 10, 4: 40, 16: 160}, "1000", 500.0, [32]),  # 7 x (21 s so far + 64 s) are too long, 7 x (21 + 32) not
        ({1: 10, 4: 40, 16: 160}, "100", 1e6, []),
        ({1: None, 4: None, 16: None}, "1000", 1e6, []),  # a CPU
        ({1: 10, 4: 40, 16: 160}, None, 1e6, []),
    ],
)
def test_the_largest_batch_is_planned_from_what_the_smaller_ones_took(
    peaks: dict[int, int | None], free: str | None, budget_s: float, expected: list[int]
) -> None:
    class Free(Engine):
        def environment(self) -> dict[str, str]:
            return {} if free is None else {FREE_MEMORY: free}

    trials = _Trials(
        engine=Free(), arm=Arm(name="export"), traffic=TRAFFIC, asks=7, budget_s=budget_s,
        seconds={1: 1.0, 4: 4.0, 16: 16.0}, peaks=peaks,
    )  # fmt: skip
    assert trials.larger() == expected


def test_a_real_export_is_timed_at_the_sizes_that_the_budget_allows(qwen: Path) -> None:
    traffic = TRAFFIC
    arm = Arm(name="export", path=qwen)
    with Engines() as engines:
        assert time_batches(arm, traffic, engines=engines, rounds=1, budget_s=0.0) == []
        rows = time_batches(arm, traffic, engines=engines, rounds=1, budget_s=1e6, sizes=(1, 2, 3))
        engine, ask = engines.open(arm), engines.open(arm).ask

        def no_room_for_three(requests: Any, options: Any) -> Any:
            if len(requests) == 3:  # as Linux ends it where the machine's memory is gone
                process: Any = engine
                process._process.kill()
                process._process.wait()
            return ask(requests, options)

        engine.ask = no_room_for_three  # type: ignore[method-assign]
        fewer = time_batches(arm, traffic, engines=engines, rounds=1, budget_s=1e6, sizes=(1, 2, 3, 4))
    assert [(found.arm, found.workload.batch_size, found.rounds) for found in rows] == [
        ("export", 1, 1), ("export", 2, 1), ("export", 3, 1),
    ]  # fmt: skip
    assert len({found.session for found in rows}) == 1
    kv_bytes = [found.memory.kv_bytes or 0 for found in rows]
    assert [size // kv_bytes[0] for size in kv_bytes] == [1, 2, 3]
    assert all((found.memory.free_bytes or 0) > 0 for found in rows)
    assert [found.workload.batch_size for found in fewer] == [1, 2]
