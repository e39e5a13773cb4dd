"""The callbacks that make a step fast, on two processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import transformers
from packaging.version import Version

from tests.support.launch import launch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2_full"])
def test_two_processes_train_as_without_them(kind: str, qwen: Path, tmp_path: Path) -> None:
    """`launch` has checked what the ranks run on: their kind of training, two of them, shards where there are any."""
    plain = launch(kind, "fast_step", tmp_path / "plain", model=str(qwen), fast=False)
    fast = launch(kind, "fast_step", tmp_path / "fast", model=str(qwen), fast=True)
    assert [report["runs_on"]["world_size"] for report in fast] == [2, 2]
    assert [report["failures"] for report in fast] == [[], []]
    assert [report["chosen"] for report in fast] == ["fast", "fast"]
    for report in fast:
        assert [step["fast"] for step in report["seen"]] == [1, 2]
        asked, processed = report["seen"][-1]["images"]
        assert 0 < processed < asked
        layers, images, towers = report["seen"][-1]["tower"]
        assert (layers, towers) == (2, 1)
        assert images > 0
    assert len(fast[0]["logs"]) == len(plain[0]["logs"]) == 2
    for found, expected in zip(fast[0]["logs"], plain[0]["logs"], strict=True):
        assert 0 <= found.pop("sampling/rollout_kl") < 1e-6
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
