"""Rows and images once in real GRPO trainings: the same training to the last bit, with less of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from transformers import TrainerCallback

from grpo_toolkit import PackedVisionCallback, rows_once
from scripts.models import tiny_training
from tests.support.images import noise
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack
SIZES = [(56, 84), (90, 61), (84, 84), (28, 56)]


def rows(**_: Any) -> Any:
    from datasets import Dataset

    prompts = [[{"role": "user", "content": f"What is number {index}?"}] for index in range(8)]
    return Dataset.from_dict(
        {"prompt": prompts, "image": [noise(index, SIZES[index % len(SIZES)]) for index in range(8)]}
    )


class Counts(TrainerCallback):  # type: ignore[misc]
    """Images that Pillow has opened, and that the image processor was given, at the end of each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = self.processed = 0
        self.steps: list[tuple[int, int]] = []
        self.monkeypatch = monkeypatch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        opening = Image.open
        kind = next(
            kind
            for kind in type(kwargs["processing_class"].image_processor).__mro__
            if "preprocess" in vars(kind) and not hasattr(kind, "answered_by")
        )
        preprocess = kind.preprocess

        def opened(*given: Any, **named: Any) -> Any:
            self.opened += 1
            return opening(*given, **named)

        def counted(this: Any, images: Any, *given: Any, **named: Any) -> Any:
            self.processed += sum(len(part) if isinstance(part, list) else 1 for part in images)
            return preprocess(this, images, *given, **named)

        self.monkeypatch.setattr(Image, "open", opened)
        self.monkeypatch.setattr(kind, "preprocess", counted)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((self.opened, self.processed))
        self.opened = self.processed = 0


def _train(base: Path, folder: Path, *, once: bool) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_training, "rows", (lambda **_: rows_once(rows())) if once else rows)
        counts = Counts(patched)
        packing = PackedVisionCallback(strict=True) if once else PackedVisionCallback(processed_bytes=0, strict=True)
        trainer = grpo_trainer(
            base, folder, [packing, counts], max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=8
        )
        kind = type(trainer.processing_class.image_processor)
        trainer.train()
        assert type(trainer.processing_class.image_processor) is kind
    keys = ("loss", "grad_norm", "reward", "completions/mean_length")
    logs = [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row]
    return logs, counts.steps


def test_a_training_is_the_same_and_reads_and_processes_each_image_once(qwen: Path, tmp_path: Path) -> None:
    _train(qwen, tmp_path / "first", once=False)  # TRL 1.0's first training in a process differs from its second
    expected, plain = _train(qwen, tmp_path / "plain", once=False)
    found, once = _train(qwen, tmp_path / "once", once=True)
    assert len(found) == 3
    assert found == expected
    # A rollout of 16 completions to four prompts: read for both micro-batches, processed to roll out and to score.
    assert sum(opened for opened, _ in plain) >= 3 * 32
    assert sum(opened for opened, _ in once) == 8
    assert [processed for _, processed in plain] == [32] * 3
    # The first batch is processed both ways. Two rollouts are an epoch: the third shows images that are known.
    [first, second, third] = [processed for _, processed in once]
    assert first <= 2 * 16 + 2 * 4
    assert (second, third) == (4, 0)


def test_saves_carry_nothing_of_it(qwen: Path, tmp_path: Path) -> None:
    plain = grpo_trainer(qwen, tmp_path / "plain", [], save_strategy="steps", save_steps=1, max_steps=1)
    trainer = grpo_trainer(
        qwen, tmp_path / "once", [PackedVisionCallback(strict=True)], save_strategy="steps", save_steps=1, max_steps=1
    )
    plain.train()
    trainer.train()
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        saved = [folder / "checkpoint-1" / file for folder in (tmp_path / "plain", tmp_path / "once")]
        assert saved[0].is_file() == saved[1].is_file()
        if saved[0].is_file():
            assert saved[1].read_bytes() == saved[0].read_bytes()
