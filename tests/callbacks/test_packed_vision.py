"""PackedVisionCallback in real GRPO trainings: the same training, rounded otherwise, and nothing left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import KVCacheCallback, PackedVisionCallback
from grpo_toolkit.model.attention.packed_vision import VisionPacking
from grpo_toolkit.model.cache_probe import vision_tower
from tests.support.training import LANGUAGE_QV, grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path


class Counts(PackedVisionCallback):
    """A callback that keeps what was packed, and how often a block of the tower ran."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self.packing is not None
        self.kept = self.packing


def _train(base: Path, folder: Path, callbacks: list[Any], *, peft: bool) -> tuple[list[dict[str, float]], int, Any]:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LANGUAGE_QV) if peft else None
    trainer = grpo_trainer(base, folder, callbacks, peft_config=config, max_steps=3, beta=0.1)
    runs: list[int] = []
    vision_tower(trainer.model).blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    trainer.train()
    keys = ("loss", "grad_norm", "reward", "entropy", "completions/mean_length")
    return [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row], len(runs), trainer


@pytest.mark.parametrize("peft", [False, True])
def test_a_training_is_the_same_and_runs_the_tower_for_distinct_images(
    qwen: Path, tmp_path: Path, peft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # TRL 1.0's first PEFT training in a process differs from its second, with or without us: so one to warm up.
    _train(qwen, tmp_path / "first", [], peft=peft)
    plain, plain_runs, _ = _train(qwen, tmp_path / "plain", [], peft=peft)
    callback = Counts(strict=True)
    with caplog.at_level("INFO", logger="grpo_toolkit"):
        packed, runs, trainer = _train(qwen, tmp_path / "packed", [KVCacheCallback(), callback], peft=peft)

    assert len(packed) == 3
    assert any(row["grad_norm"] > 0 for row in packed)
    for found, expected in zip(packed, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    images = callback.kept.images[0]
    assert images.asked == 4 * images.encoded > 0  # micro-batches and rollouts of four completions of one prompt
    lines = [record.message for record in caplog.records if "vision attention" in record.message]
    said = "grpo_toolkit: vision attention packed: 2 layers, one call each; each distinct image encoded once"
    assert lines in ([said], [said + "; no gradient for the frozen tower"])
    assert callback.packing is None
    assert runs < plain_runs if lines[0].endswith("tower") else runs == plain_runs
    assert not vision_tower(trainer.model)._forward_pre_hooks


@v5_only
def test_a_frozen_tower_is_not_recomputed_in_a_training(qwen: Path, tmp_path: Path) -> None:
    _, plain, _ = _train(qwen, tmp_path / "plain", [], peft=True)
    _, packed, _ = _train(qwen, tmp_path / "packed", [PackedVisionCallback(strict=True)], peft=True)
    assert plain - packed == 3  # one recompute a step


def test_checkpoints_carry_nothing_of_it(qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    trainer = grpo_trainer(
        qwen, tmp_path, [PackedVisionCallback(strict=True)], max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    saved = tmp_path / "checkpoint-1"
    for path in saved.glob("*.json"):
        assert "packed" not in path.read_text(), path.name
    loaded = AutoModelForImageTextToText.from_pretrained(saved)
    assert vision_tower(loaded).config._attn_implementation == "sdpa"


def test_a_failure_is_survived_and_raised_at_the_end_if_asked(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: VisionPacking, model: Any) -> None:
        raise RuntimeError("no such tower")

    monkeypatch.setattr(VisionPacking, "__init__", fail)
    callback = PackedVisionCallback()
    grpo_trainer(qwen, tmp_path, [callback], max_steps=1).train()
    assert callback.failures == ["packing the vision tower failed: RuntimeError: no such tower"]
    with pytest.raises(RuntimeError, match="no such tower"):
        grpo_trainer(qwen, tmp_path, [PackedVisionCallback(strict=True)], max_steps=1).train()
