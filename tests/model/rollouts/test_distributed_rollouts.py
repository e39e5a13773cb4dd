"""Fast rollouts of weights that are sharded over two processes: gathered into the copy, on all ranks or on none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import transformers
from packaging.version import Version

from tests.support.launch import launch

if TYPE_CHECKING:
    from pathlib import Path

needs_5_24 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts need transformers 5.24"
)


@needs_5_24
@pytest.mark.parametrize(
    ("kind", "lora"),
    [("ddp", False), ("fsdp2_full", False), ("fsdp2_full", True), ("zero2", False), ("zero3", False)],
)
def test_the_copy_is_the_policy_after_each_step(kind: str, lora: bool, qwen: Path, tmp_path: Path) -> None:
    reports = launch(kind, "fast_rollouts", tmp_path, model=str(qwen), way="fast", lora=lora, max_steps=3)
    for report in reports:
        assert report["failures"] == []
        assert report["chosen"] == "fast"
        assert [count for count, _ in report["seen"]] == [1, 2, 3]
        assert all(gap < 1e-5 for _, gap in report["seen"])
        assert 0 <= report["kl"] < 1e-6


@needs_5_24
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rollout_that_fails_on_one_rank_is_plain_on_all(failing_rank: int, qwen: Path, tmp_path: Path) -> None:
    plain = launch(
        "fsdp2_full", "fast_rollouts", tmp_path / "plain", model=str(qwen), way="plain", max_steps=3, logging_steps=1
    )
    failed = launch(
        "fsdp2_full", "fast_rollouts", tmp_path / "fails", model=str(qwen), way="fast", max_steps=3, logging_steps=1,
        failing_ranks=[failing_rank],
    )  # fmt: skip
    norms = plain[0]["grad_norms"]
    assert len(norms) == 3
    assert failed[0]["grad_norms"] == pytest.approx(norms, rel=1e-6)  # the training goes on as if nobody had tried
    assert [report["chosen"] for report in failed] == ["plain", "plain"]
    own = "OSError: [Errno 5] Input/output error"
    for rank, report in enumerate(failed):
        assert report["seen"][0][0] == 1
        assert (own if rank == failing_rank else f"PeerError: rank {failing_rank}: {own}") in report["failures"][0]


@needs_5_24
@pytest.mark.parametrize(
    ("kind", "fails_at", "settings"),
    [
        ("fsdp2_full", "prefill", {"way": "auto", "trial": True}),
        ("ddp", "prefill", {"way": "auto", "trial": True}),
        ("fsdp2_full", "install", {"way": "fast"}),
        ("ddp", "install", {"way": "auto", "trial": True}),
        ("fsdp2_full", "_empty", {"way": "fast"}),  # no room for the 21st tensor: the others would wait in its gather
    ],
)
def test_no_rank_waits_for_one_that_failed_before_its_first_fast_rollout(
    kind: str, fails_at: str, settings: dict[str, Any], qwen: Path, tmp_path: Path
) -> None:
    reports = launch(
        kind, "fast_rollouts", tmp_path, model=str(qwen), max_steps=2, logging_steps=1, failing_ranks=[0],
        fails_at=fails_at, **settings,
    )  # fmt: skip
    assert [report["chosen"] for report in reports] == ["plain", "plain"]
    assert "OSError: [Errno 5] Input/output error" in reports[0]["failures"][0]
    assert all(len(report["grad_norms"]) == 2 for report in reports)
