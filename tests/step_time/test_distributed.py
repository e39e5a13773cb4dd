"""Two processes: the same training, each has its steps in a file, and the one that the other waits for is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.step_time.store import load_step_review
from tests.support.launch import launch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_the_slow_rank_is_named(kind: str, qwen: Path, tmp_path: Path) -> None:
    main, other = launch(kind, "step_times", tmp_path, model=str(qwen), slow_rank=1, max_steps=3)
    for report in (main, other):
        assert report["is_same"]
        assert report["sums"] == pytest.approx([1.0] * 3, rel=0.01)
        assert {"rollout", "rewards", "forward", "backward"} <= set(report["phases"])
    if kind == "ddp":  # where parameters are sharded, ranks also wait for each other in the middle of a rollout
        # Whether two seconds are much of a step, and so a cause, hangs on what else this machine does.
        assert main["slowest"] == 1
    review = load_step_review(tmp_path / "out")
    assert [(row.step, row.rank, row.world_size) for row in review.steps] == [(1, 0, 2), (2, 0, 2), (3, 0, 2)]
    assert [(row.step, row.rank) for row in review.ranks] == [(1, 1), (2, 1), (3, 1)]
    assert all(row.phases_s["rewards"] >= 2.0 for row in review.ranks)
