"""Resuming: the fault (training goes on from the base), the proof, the cure."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import ExportCallback, KVCacheCallback, ResumeGuardCallback
from grpo_toolkit.checkpoint.folders.trainer_checkpoints import last_whole_checkpoint, why_not_whole
from grpo_toolkit.errors import ResumeError
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.resume_check import ensure_checkpoint_weights
from tests.support.training import LANGUAGE_QV, grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=LANGUAGE_QV)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def straight(qwen: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four steps without a stop; checkpoint-2 on the way."""
    trainer = grpo_trainer(qwen, tmp_path / "straight", [KVCacheCallback(strict=True)], **SAVING)
    trainer.train()
    return tmp_path / "straight" / "checkpoint-2", weights(trainer)


def resumed(model: Path, checkpoint: Path, output_dir: Path, callbacks: list[Any], **options: Any) -> Any:
    output_dir.mkdir()
    shutil.copytree(checkpoint, output_dir / checkpoint.name)
    trainer = grpo_trainer(model, output_dir, callbacks, **SAVING, **options)
    trainer.train(resume_from_checkpoint=str(output_dir / checkpoint.name))
    return trainer


def test_a_plain_resume_trains_on_from_the_base_and_a_guarded_one_does_not(
    qwen: Path, straight: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, wanted = straight
    assert not same(weights(resumed(qwen, checkpoint, tmp_path / "plain", [])), wanted)

    guard = ResumeGuardCallback()
    guarded = resumed(qwen, checkpoint, tmp_path / "guarded", [KVCacheCallback(), guard])
    assert same(weights(guarded), wanted)
    assert guard.report is not None
    assert len(guard.report.restored) > guard.report.compared // 2
    assert "were not the checkpoint's" in caplog.text


def test_a_resume_of_the_checkpoint_as_model_needs_nothing(straight: tuple[Path, Any], tmp_path: Path) -> None:
    checkpoint, wanted = straight
    guard = ResumeGuardCallback()
    trainer = resumed(checkpoint, checkpoint, tmp_path / "again", [KVCacheCallback(), guard])
    assert same(weights(trainer), wanted)
    assert guard.report is not None
    assert guard.report.restored == ()


def test_a_lora_resume_is_bit_identical_and_proven(qwen: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(qwen, tmp_path / "straight", [KVCacheCallback()], peft_config=lora(), **SAVING)
    trainer.train()
    guard = ResumeGuardCallback()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    again = resumed(qwen, checkpoint, tmp_path / "again", [KVCacheCallback(), guard], peft_config=lora())
    assert same(weights(again), weights(trainer))
    assert guard.report is not None
    assert guard.report.compared > 0
    assert guard.report.restored == ()


def test_merged_weights_in_a_lora_checkpoint_do_not_make_it_forget_the_adapter(qwen: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(qwen, tmp_path / "straight", [KVCacheCallback()], peft_config=lora(), **SAVING)
    trainer.train()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    shutil.copyfile(qwen / "model.safetensors", checkpoint / "model.safetensors")  # a merge put where it must not be
    plain = resumed(qwen, checkpoint, tmp_path / "plain", [], peft_config=lora())
    assert not same(weights(plain), weights(trainer))
    guarded = resumed(qwen, checkpoint, tmp_path / "guarded", [ResumeGuardCallback()], peft_config=lora())
    assert same(weights(guarded), weights(trainer))


def test_a_checkpoint_without_the_weights_stops_before_the_first_step(
    qwen: Path, straight: tuple[Path, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint, _ = straight
    stored = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "layers.1." not in name}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"lacks \d+ of the model's \d+ tensors"):
        resumed(qwen, checkpoint, tmp_path / "out", [ResumeGuardCallback()])
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_an_adapter_checkpoint_for_a_full_model_is_an_error(qwen: Path, tmp_path: Path) -> None:
    grpo_trainer(qwen, tmp_path / "lora", peft_config=lora(), **SAVING).train()
    model = load_model(qwen)[0]
    with pytest.raises(ResumeError, match="holds an adapter, but the model in training has none"):
        ensure_checkpoint_weights(model, tmp_path / "lora" / "checkpoint-2")


def test_another_runs_checkpoint_of_the_same_step_is_left_alone(
    qwen: Path, straight: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, _ = straight
    grpo_trainer(qwen, tmp_path / "other", **(SAVING | {"seed": 8, "max_steps": 2})).train()
    guard = ResumeGuardCallback()
    trainer = grpo_trainer(checkpoint, tmp_path / "other", [guard], **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))  # while other/checkpoint-2 lies where one would look
    assert guard.report is None
    assert "it is not proven that this resume has its weights" in caplog.text
    named = ResumeGuardCallback(checkpoint=checkpoint)
    again = grpo_trainer(qwen, tmp_path / "third", [named], **SAVING)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert named.report is not None
    assert named.report.restored


def test_an_adapter_with_a_name_of_its_own_is_proven(qwen: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    def named() -> Any:
        torch.manual_seed(0)
        return get_peft_model(load_model(qwen)[0], lora(), adapter_name="policy")

    grpo_trainer(named(), tmp_path / "out", **SAVING, processing_class=load_model(qwen)[1]).train()
    guard = ResumeGuardCallback()
    trainer = grpo_trainer(named(), tmp_path / "out", [guard], **SAVING, processing_class=load_model(qwen)[1])
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert guard.report is not None
    assert guard.report.compared > 0


@v5_only
def test_the_best_model_is_really_loaded_at_the_end(qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.support.training import rows

    is_best = {}
    for name, callbacks in (("plain", []), ("guarded", [ResumeGuardCallback()])):
        trainer = grpo_trainer(
            qwen,
            tmp_path / name,
            callbacks,
            **(SAVING | {"save_steps": 1}),
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_num_tokens",  # grows with every step: the first checkpoint is the best
            greater_is_better=False,
            eval_dataset=rows(2),
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        stored = load_file(trainer.state.best_model_checkpoint + "/model.safetensors")
        live = trainer.model.get_input_embeddings().weight
        is_best[name] = torch.equal(live, stored["model.embed_tokens.weight"])
    assert is_best == {"plain": False, "guarded": True}


def test_a_fresh_training_is_left_alone(qwen: Path, tmp_path: Path) -> None:
    guard = ResumeGuardCallback()
    grpo_trainer(qwen, tmp_path / "out", [guard, ExportCallback(tmp_path / "export", strict=True)]).train()
    assert guard.report is None


def test_the_newest_whole_checkpoint_is_found_and_the_broken_one_named(
    straight: tuple[Path, Any], tmp_path: Path
) -> None:
    run = straight[0].parent
    assert last_whole_checkpoint(run) == (run / "checkpoint-4", ())
    weights_file = run / "checkpoint-4" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])  # killed in the middle of a save
    (run / "checkpoint-10").mkdir()  # killed at its start
    (run / "checkpoint-2-export").mkdir()
    found, skipped = last_whole_checkpoint(run)
    assert found == run / "checkpoint-2"
    assert [line.partition(": ")[0] for line in skipped] == [str(run / "checkpoint-10"), str(run / "checkpoint-4")]
    assert "cut off" in skipped[1]
    assert last_whole_checkpoint(tmp_path / "nowhere") == (None, ())
    assert why_not_whole(run / "checkpoint-2") is None
