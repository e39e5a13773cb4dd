"""`StepTimeCallback(trials=True)`: cures are tried once the training is over, and change nothing of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import FastRolloutCallback, KVCacheCallback, PackedVisionCallback, StepTimeCallback
from grpo_toolkit.model.attention.packed_vision import VisionPacking
from grpo_toolkit.model.kv_cache import is_checkpointing
from grpo_toolkit.model.rollouts.rollouts import FastRollouts, rollouts_of
from grpo_toolkit.reporting.terminal.step_time import step_lines
from grpo_toolkit.step_time.causes.cause import FAST, PACKED
from grpo_toolkit.step_time.store import FILE_NAME
from tests.callbacks.test_fast_rollout import needs_5_24
from tests.support.training import LANGUAGE_QV, grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path


def trained(base: Path, folder: Path, *callbacks: Any, trials: bool, peft: bool = False) -> tuple[Any, Any]:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LANGUAGE_QV) if peft else None
    callback = StepTimeCallback(strict=True, floors=False, trials=trials)
    trainer = grpo_trainer(base, folder, [callback, *callbacks], max_steps=3, peft_config=config)
    callback.trainer = trainer
    trainer.train()
    return callback, trainer


@needs_5_24
@pytest.mark.parametrize("peft", [False, True])
def test_cures_are_measured_beside_what_they_were_predicted_to_save(
    peft: bool, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(qwen, tmp_path / "first", trials=False, peft=peft)  # TRL's first PEFT training differs from its second
    packings: list[VisionPacking] = []
    fast: list[FastRollouts] = []
    for kind, made in ((VisionPacking, packings), (FastRollouts, fast)):
        init: Any = kind.__init__

        def noted(self: Any, *args: Any, init: Any = init, made: Any = made, **kwargs: Any) -> None:
            made.append(self)
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", noted)
    monkeypatch.setattr("grpo_toolkit.step_time.explain.WORTH", 0.0)  # whatever it costs at this size
    callback, trainer = trained(qwen, tmp_path / "tried", trials=True, peft=peft)
    explanation = callback.explanation
    tried = {one.line: one for one in explanation.tried}
    assert set(tried) == {PACKED, FAST}
    for line, one in tried.items():
        assert set(one.causes) <= {found.cause for found in explanation.causes if found.line == line}
        assert one.predicted_s > 0
        assert isinstance(one.measured_s, float)
    assert len(packings) == 4  # one to warm up, three that are timed
    assert packings[0].images[0].asked > packings[0].images[0].encoded
    assert [one.count for one in fast] == [2]  # one to warm up, one that is timed
    assert rollouts_of(trainer.model) is None
    assert sum("tried: " in line for line in step_lines(explanation)) == 2
    rows = [json.loads(line) for line in (tmp_path / "tried" / FILE_NAME).read_text().splitlines()]
    assert rows[-1]["tried"] == [
        {"line": one.line, "causes": one.causes, "predicted_s": one.predicted_s, "measured_s": one.measured_s}
        for one in explanation.tried
    ]

    untried, other = trained(qwen, tmp_path / "untried", trials=False, peft=peft)
    assert untried.explanation.tried == []
    for (name, mine), (_, theirs) in zip(
        trainer.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in other.state.log_history if "loss" in entry
    ]


@needs_5_24
def test_what_is_cured_already_is_not_tried(qwen: Path, tmp_path: Path) -> None:
    cures = PackedVisionCallback(), FastRolloutCallback("fast")
    callback, _ = trained(qwen, tmp_path, *cures, trials=True)
    assert callback.explanation.tried == []


def test_packing_is_tried_on_a_model_that_checkpoints_as_it_did_in_the_training(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_toolkit.step_time.explain.WORTH", 0.0)
    callback = StepTimeCallback(strict=True, floors=False, trials=True)
    before = [KVCacheCallback(strict=True), callback]  # which leaves the training first
    trainer = grpo_trainer(qwen, tmp_path, before, max_steps=3, gradient_checkpointing=True)
    callback.trainer = trainer
    forwards: list[str] = []
    layer = trainer.model.get_decoder().layers[0]

    def counted(*_: Any) -> None:
        if torch.is_grad_enabled() and not trainer.model.training and not layer.training:
            forwards.append("evaluated")
        elif torch.is_grad_enabled():
            forwards.append("trained")

    layer.self_attn.register_forward_pre_hook(counted)
    trainer.train()
    assert PACKED in {one.line for one in callback.explanation.tried}  # type: ignore[union-attr]
    # Steps, and the eight passes of the trial: each layer's forward once more in its backward.
    assert "evaluated" not in forwards
    assert len(forwards) >= 2 * 8 + 2 * 3
    assert not layer.training
    assert not is_checkpointing(trainer.model)
