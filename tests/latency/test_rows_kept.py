"""The rows of a measurement that goes on: on disk after every round, and found again whatever ended it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.compare import compare_latency
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import Answer, Engine, EngineFacts
from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.latency.rows.store import FILE_NAME, PARTIAL_NAME, RoundRows, read_measurements, recover_rows
from grpo_toolkit.latency.rows.timeline import Timeline
from grpo_toolkit.model.generation.request import Request
from tests.support.latency_rows import row

if TYPE_CHECKING:
    from pathlib import Path


class Interrupted(Engine):
    """An engine that somebody interrupts at its sixth answer."""

    def __init__(self) -> None:
        self.asked = 0

    def facts(self) -> EngineFacts:
        return EngineFacts()

    def ask(self, *_: Any) -> Answer:
        self.asked += 1
        if self.asked == 6:
            raise KeyboardInterrupt
        return Answer(timeline=Timeline(token_times_s=[0.1, 0.2], prompt_tokens=1, output_tokens=2))


def test_an_interrupt_leaves_the_rounds_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_toolkit.latency.engines.pool.open_engine", lambda _: Interrupted())
    kept = RoundRows(tmp_path)
    traffic = traffic_of([Request(messages=[{"role": "user", "content": "?"}])], max_new_tokens=2)
    with pytest.raises(KeyboardInterrupt), Engines() as engines:
        compare_latency(
            [Arm(name="a", url="one")], traffic, warmup=2, control=False, progress=False, keep=kept.keep,
            engines=engines,
        )  # fmt: skip
    assert [found.rounds for found in kept.rows] == [3]
    assert read_measurements(tmp_path / PARTIAL_NAME) == kept.rows
    kept.finish(kept.rows)
    assert [found.rounds for found in read_measurements(tmp_path / FILE_NAME)] == [3]
    assert not (tmp_path / PARTIAL_NAME).exists()


def test_what_a_kill_left_is_read_and_recovered_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no latency\.jsonl"):
        load_review(tmp_path)
    assert recover_rows(tmp_path) == 0
    kept = RoundRows(tmp_path)
    for rounds in (1, 2):
        kept.keep([replace(row("base"), rounds=rounds)])
    (found,) = load_review(tmp_path).rows
    assert found.rounds == 2
    assert recover_rows(tmp_path) == 1
    assert recover_rows(tmp_path) == 0
    assert load_review(tmp_path).rows == [found]


def test_without_a_folder_rounds_are_kept_in_memory_alone() -> None:
    kept = RoundRows(None)
    kept.keep([row("base")])
    assert [found.arm for found in kept.rows] == ["base"]
    kept.finish(kept.rows)
    assert kept.rows == []
