"""Lengths padded to multiples of a number: fewer of them, and the same training."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.version import Version

from tests.recipes.test_plan import plan_of
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


def train(base: Path, folder: Path, **options: Any) -> tuple[list[dict[str, float]], set[int]]:
    """Return what a training logs, and the lengths of the forwards that it learns from."""
    torch.manual_seed(0)
    trainer = grpo_trainer(base, folder, max_steps=3, beta=0.1, **options)
    lengths: set[int] = set()

    def look(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            lengths.add(given["input_ids"].shape[1])

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    keys = ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")
    return [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row], lengths


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_padded_training_is_the_same(loss_type: str, qwen: Path, tmp_path: Path) -> None:
    plain, ragged = train(qwen, tmp_path / "plain", loss_type=loss_type, pad_to_multiple_of=None)
    padded, even = train(qwen, tmp_path / "padded", loss_type=loss_type, pad_to_multiple_of=64)
    assert any(length % 64 for length in ragged)
    assert {length % 64 for length in even} == {0}
    assert any(row["grad_norm"] > 0 for row in padded)
    for found, expected in zip(padded, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_it_is_planned_where_it_is_asked_for(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    said = "lengths     padded to multiples of 128 tokens"
    flags = ("--per_device_train_batch_size", "4", "--num_generations", "4", "--dry_run", "true")
    assert said not in plan_of(qwen, geometry, tmp_path, *flags).lines()
    assert said in plan_of(qwen, geometry, tmp_path, *flags, "--pad_to_multiple_of", "128").lines()
