"""The share of time in which a device works while a rollout decodes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import StepTimeCallback
from grpo_toolkit.step_time.explain import find_causes
from grpo_toolkit.step_time.seams.busy_share import FIRST, STEPS, BusyShare, covered
from grpo_toolkit.step_time.seen import RolloutSeen, Seen
from tests.step_time.test_causes import MEAN
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path


def test_overlapping_spans_count_once() -> None:
    assert covered([]) == 0.0
    assert covered([(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 7.0)]) == 6.0


def test_decode_steps_of_a_close_step_are_profiled_where_that_is_wanted(qwen: Path, tmp_path: Path) -> None:
    length = FIRST + STEPS + 2
    found: dict[bool, Any] = {}
    for profile in (False, True):
        callback = StepTimeCallback(strict=True, floors=False, profile=profile)
        trainer = grpo_trainer(
            qwen,
            tmp_path / str(profile),
            [callback],
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
        )
        callback.trainer = trainer
        trainer.train()
        assert callback._seen is not None
        found[profile] = callback._seen.rollout
    assert found[False].busy is None
    assert 0.0 < found[True].busy <= 1.0
    assert replace(found[True], busy=None) == found[False]  # the training is the same


def test_somebody_elses_profile_goes_on() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs:
        busy = BusyShare(torch.device("cpu"))
        for _ in range(FIRST + STEPS):
            busy.before_step()
            torch.ones(3).sum()
    assert busy.share is None
    assert any("sum" in event.key for event in theirs.key_averages())


@pytest.mark.parametrize(("busy", "is_found"), [(None, True), (0.2, True), (0.95, False)])
def test_a_gpu_that_works_all_the_time_waits_for_no_launch(busy: float | None, is_found: bool) -> None:
    seen = Seen(rollout=RolloutSeen(rows=8, is_cached=True, busy=busy), is_gpu=True)
    causes = {one.cause: one for one in find_causes(seen, MEAN)}
    assert ("decode-launched-by-kernel" in causes) is is_found
    if busy == 0.2:
        assert causes["decode-launched-by-kernel"].evidence.endswith("and the GPU works for 20% of it")
