"""The cost of a step, measured in a real trainer whose rows and evaluations take their time."""

from __future__ import annotations

import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.version import Version
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


class Slow(Dataset[dict[str, Any]]):
    """A dataset whose rows take some time to read."""

    def __init__(self, count: int, *, seconds: float) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"x": torch.ones(2), "labels": torch.ones(1)}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.linear(x)
        return {"loss": ((found - labels) ** 2).mean(), "logits": found}


def make_slow(trainer: Any, name: str, *, seconds: float) -> None:
    method = getattr(trainer, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **kwargs)

    setattr(trainer, name, slow)


def test_a_step_has_the_reading_of_its_rows_and_neither_evaluation_nor_save(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from grpo_vlm.training.cost import CostCallback

    cost = CostCallback(0.0)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    reading = {"train_dataset": Slow(12, seconds=0.05), "eval_dataset": Slow(1, seconds=0.0)}
    trainer = Trainer(model=Line(), args=settings, callbacks=[cost], **reading)
    make_slow(trainer, "evaluate", seconds=1.0)
    make_slow(trainer, "_save_checkpoint", seconds=1.0)
    trainer.train()
    assert len(cost.steps_s) == 3
    assert 0.2 <= cost.steps_s[1] < 1.0
    assert cost.steps_s[2] < 1.0
