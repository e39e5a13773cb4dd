"""The trial of `FastRolloutCallback(trial=True)`: a clock decides once, and nothing else is changed by it."""

from __future__ import annotations

import json
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit import FastRolloutCallback, InputError
from grpo_toolkit.model.rollouts import trial
from tests.callbacks.test_fast_rollout import losses, needs_5_24, train

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_5_24


def clock_of(monkeypatch: pytest.MonkeyPatch, *, fast_s: float, plain_s: float) -> list[float]:
    """Have the trial's clock say that the two ways took so long; returns the times at which it was read."""
    read: list[float] = []
    ticks = accumulate(cycle((0.0, fast_s, 1.0, plain_s)))

    def now() -> float:
        read.append(next(ticks))
        return read[-1]

    monkeypatch.setattr(trial, "perf_counter", now)
    return read


@pytest.mark.parametrize(("plain_s", "chosen"), [(1.19, "plain"), (1.2, "fast")])
def test_the_clock_decides_once_and_the_random_state_is_kept(
    plain_s: float,
    chosen: str,
    qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = clock_of(monkeypatch, fast_s=1.0, plain_s=plain_s)
    callback = FastRolloutCallback(trial=True, strict=True)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    tried, rolled = train(qwen, tmp_path / "tried", callback, **options)
    assert len(read) == 4
    assert callback.chosen == chosen
    assert rolled.counts == ([(1, 2), (2, 4)] if chosen == "fast" else [(0, 0), (0, 0)])
    said = [record.message for record in caplog.records if "in a trial" in record.message]
    assert said == [
        "grpo_toolkit: rollouts go the fast way: in a trial it was 1.20 times as fast"
        if chosen == "fast"
        else "grpo_toolkit: rollouts go the plain way: in a trial the fast one was 1.19 times as fast, not 1.2"
    ]
    untried, without = train(qwen, tmp_path / "untried", FastRolloutCallback(chosen))
    assert rolled.said == without.said
    assert losses(tried) == losses(untried)

    checkpoint = tmp_path / "tried" / "checkpoint-1"
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["FastRolloutCallback"]
    assert (kept["args"]["trial"], kept["attributes"]) == (True, {"chosen": chosen})
    resumed = FastRolloutCallback(trial=True, strict=True)
    train(qwen, tmp_path / "resumed", resumed, resume=checkpoint, **options)
    assert resumed.chosen == chosen
    assert len(read) == 4  # nothing is tried again


def test_a_trial_that_fails_leaves_rollouts_plain(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("grpo_toolkit.model.rollouts.rollouts.prefill", fails)
    callback = FastRolloutCallback(trial=True)
    tried, rolled = train(qwen, tmp_path / "tried", callback)
    assert callback.chosen == "plain"
    assert len(callback.failures) == 1
    untried, without = train(qwen, tmp_path / "untried", FastRolloutCallback("plain"))
    assert rolled.said == without.said
    assert losses(tried) == losses(untried)


def test_who_chooses_a_way_needs_no_trial() -> None:
    with pytest.raises(InputError, match='trial=True is for way="auto"'):
        FastRolloutCallback("fast", trial=True)
