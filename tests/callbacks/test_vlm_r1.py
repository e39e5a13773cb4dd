"""A trainer of the kind that VLM-R1, R1-V and Visual-RFT ship, on whatever stack runs the tests.

A `transformers.Trainer` subclass that loads the model with `use_cache=False` when gradient checkpointing is on, wraps
PEFT itself, and generates in `compute_loss` with a `GenerationConfig` of its own. Under transformers 4.x that poisons
`generation_config.json`, the worst form of the leak; 5.x refuses the argument, so there the switch is set on the
generation config after loading.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from grpo_toolkit import ExportCallback, KVCacheCallback, inference_ready
from grpo_toolkit.model.cache_probe import CacheProbe
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_model
from tests.support.training import rows

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

IS_V4 = Version(transformers.__version__) < Version("5.0")


class RolloutTrainer(Trainer):
    """A trainer that samples one completion a prompt and raises its likelihood."""

    def __init__(self, model: Path, args: TrainingArguments, *, peft_config: Any = None, callbacks: list[Any]) -> None:
        options: dict[str, Any] = {"use_cache": False} if IS_V4 and args.gradient_checkpointing else {}
        policy: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, **options)
        if not IS_V4:
            policy.generation_config.use_cache = False
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        processor = AutoProcessor.from_pretrained(model)
        self.sampling = GenerationConfig(
            max_new_tokens=6, do_sample=True, temperature=1.0, pad_token_id=processor.tokenizer.pad_token_id
        )
        self.fed: list[list[int]] = []
        super().__init__(
            model=policy,
            args=args,
            data_collator=lambda batch: batch,
            train_dataset=rows(4),
            processing_class=processor,
            callbacks=callbacks,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        [row] = inputs
        request = Request(messages=row["prompt"], images=[row["image"]])
        batch = prepare_inputs(self.processing_class, [request])
        prompt_length = batch["input_ids"].shape[1]
        model.eval()
        with torch.no_grad(), CacheProbe(model) as probe:
            ids = model.generate(**batch, generation_config=self.sampling)
        model.train()
        self.fed.append(probe.step_lengths)
        batch = dict(batch) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in batch:
            batch["mm_token_type_ids"] = torch.nn.functional.pad(
                batch["mm_token_type_ids"], (0, ids.shape[1] - prompt_length)
            )
        logits = model(**batch).logits[:, prompt_length - 1 : -1]
        return -logits.log_softmax(-1).gather(-1, ids[:, prompt_length:, None]).mean()


def train(base: Path, output_dir: Path, callbacks: list[Any], **options: Any) -> RolloutTrainer:
    peft_config = options.pop("peft_config", None)
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(output_dir), **(settings | options))
    trainer = RolloutTrainer(base, args, peft_config=peft_config, callbacks=callbacks)
    trainer.train()
    return trainer


def test_without_callbacks_rollouts_and_checkpoints_are_poisoned(
    qwen: Path, tmp_path: Path, image_request: Request
) -> None:
    trainer = train(qwen, tmp_path, [])
    if Version(transformers.__version__) >= Version("4.50"):  # 4.49 takes the rollout config's own default, true
        assert all(lengths[1] == lengths[0] + 1 for lengths in trainer.fed)
    generation = json.loads((tmp_path / "checkpoint-2" / "generation_config.json").read_text())
    assert generation["use_cache"] is False
    model, processor, _ = load_model(tmp_path / "checkpoint-2")
    assert not generate(model, processor, image_request).is_cached


def test_with_callbacks_everything_is_clean(qwen: Path, tmp_path: Path, image_request: Request) -> None:
    exporting = ExportCallback(tmp_path / "export", num_prompts=2, strict=True)
    trainer = train(qwen, tmp_path / "out", [KVCacheCallback(strict=True), exporting])
    assert all(lengths[1:] == [1] * (len(lengths) - 1) for lengths in trainer.fed)
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2", tmp_path / "export"):
        model, processor, report = load_model(folder)
        assert report.is_clean
        record = generate(model, processor, image_request)
        assert record.is_cached, folder
        assert record.vision_calls == 1
    assert exporting.result is not None
    with inference_ready(trainer.model):
        assert generate(trainer.model, trainer.processing_class, image_request).tokens == record.tokens
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (qwen / name).read_bytes()


def test_a_self_made_peft_model_is_merged(qwen: Path, tmp_path: Path, image_request: Request) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    exporting = ExportCallback(tmp_path / "export", num_prompts=2, strict=True)
    trainer = train(qwen, tmp_path / "out", [KVCacheCallback(strict=True), exporting], peft_config=config)
    assert all(lengths[1:] == [1] * (len(lengths) - 1) for lengths in trainer.fed)
    assert exporting.result is not None
    assert exporting.result.verification is not None
    assert exporting.result.verification.passed
    assert {p.name for p in (tmp_path / "out" / "checkpoint-2").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "out" / "checkpoint-2" / "config.json").exists()  # nothing extra in an adapter checkpoint


def test_loss_is_bit_identical_with_and_without_callbacks(qwen: Path, tmp_path: Path) -> None:
    """From a clean base; a poisoned one decodes differently in the last bits."""
    losses = {}
    for name in ("with", "without"):
        callbacks = [KVCacheCallback(strict=True)] if name == "with" else []
        trainer = train(qwen, tmp_path / name, callbacks, gradient_checkpointing=False)
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses["with"]) == 2
    assert losses["with"] == losses["without"]


@pytest.mark.skipif(not IS_V4, reason="5.x refuses the argument")
def test_a_trainers_own_use_cache_is_not_called_the_bases(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(qwen, tmp_path, [KVCacheCallback(strict=True)], max_steps=1)
    assert "passed it to from_pretrained" in caplog.text
    assert "this base was saved with" not in caplog.text


def test_the_export_is_verified_with_the_trainers_own_rows(qwen: Path, tmp_path: Path) -> None:
    """transformers 4.49 gives callbacks no dataloader."""
    export = ExportCallback(tmp_path / "export", strict=True)
    train(qwen, tmp_path / "out", [KVCacheCallback(strict=True), export], max_steps=1)
    assert export.result is not None
    assert export.result.verification is not None
    said = {check.name: check.detail for check in export.result.verification.checks}
    assert "4" in said["same greedy tokens as the trained policy"]
