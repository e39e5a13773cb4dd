"""The trainers that R1-V, Visual-RFT and VLM-R1 ship, by their flags and data paths, on whatever stack runs the tests.

Each subclasses `transformers.Trainer`, loads the model with `use_cache` set by gradient checkpointing (None without
it), makes completions in groups with a `GenerationConfig` of its own, and holds the policy against a copy of the model
or against the base under its adapter. They differ in how rows name their pictures, in what is frozen and adapted, and
in how the processor is limited. Their code is not here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from grpo_toolkit import ExportCallback, KVCacheCallback, ResumeGuardCallback, diagnose_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

IS_V4 = Version(transformers.__version__) < Version("5.0")
READER = f"transformers=={transformers.__version__}"  # an adapter of 4.49 is named as 5 does not look for it
TEMPLATE = "{Question}  Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."


@dataclass(frozen=True, kw_only=True)
class Script:
    """A published script: its flags, its rows, and what its trainer does to the model."""

    columns: tuple[str, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    max_pixels: int | None = None
    lora: bool = False
    frozen_tower: bool = False
    beta: float = 0.04
    generations: int = 2


SCRIPTS = {
    # src/r1-v/run_grpo.sh: rows with `image`, `problem` and `solution`, a reference model, checkpointing on.
    "r1-v": Script(
        columns=("image", "problem", "solution"),
        flags={"gradient_checkpointing": True, "max_grad_norm": 1.0, "logging_steps": 1, "save_only_model": True},
        max_pixels=401408,
    ),
    # src/virft/src/open_r1/grpo.py without checkpointing, where `use_cache=None` is passed on.
    "visual-rft": Script(
        columns=("image", "problem", "solution"),
        flags={"gradient_checkpointing": False, "save_steps": 1},
        max_pixels=401408,
    ),
    # run_scripts/run_grpo_rec.sh: rows with `image_path` (a list) and `prompt` in parts; the tower is frozen.
    "vlm-r1": Script(
        columns=("image_path", "problem", "solution"),
        flags={"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        frozen_tower=True,
    ),
    # run_scripts/run_grpo_rec_lora.sh: every linear layer of the language model, learned ten times as fast.
    "vlm-r1 lora": Script(
        columns=("image_path", "problem", "solution"),
        flags={"gradient_checkpointing": True, "learning_rate": 1e-2},
        lora=True,
    ),
}


def dataset_of(script: Script, folder: Path) -> Any:
    """Return the rows of a script, written and read as its dataset is."""
    from datasets import Dataset, load_dataset

    columns: dict[str, list[Any]] = {
        "problem": [f"What is number {number}?" for number in range(4)],
        "solution": [f"<answer> {number} </answer>" for number in range(4)],
    }
    pictures = [Image.new("RGB", (56, 56), (number * 50, 80, 120)) for number in range(4)]
    if "image_path" in script.columns:
        (folder / "pictures").mkdir(parents=True)
        paths = [folder / "pictures" / f"{number}.png" for number in range(4)]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        columns["image_path"] = [[str(path)] for path in paths]
    else:
        columns["image"] = pictures
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(columns).to_parquet(folder / "data" / "train.parquet")
    read = load_dataset(str(folder / "data"), split="train", cache_dir=str(folder / "cache"))
    return read.map(conversation)


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "text", "text": TEMPLATE.format(Question=row["problem"])}
    return {"prompt": [{"role": "user", "content": [{"type": "image", "text": None}, text]}]}


class GroupTrainer(Trainer):
    """A trainer that samples a group of completions a prompt and weighs each by its reward within the group."""

    def __init__(
        self, base: Path, args: TrainingArguments, script: Script, dataset: Any, callbacks: list[Any]
    ) -> None:
        options: dict[str, Any] = {"use_cache": False if args.gradient_checkpointing else None} if IS_V4 else {}
        policy: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, torch_dtype=torch.float32, **options)
        if script.lora:
            from peft import LoraConfig, get_peft_model

            linear = [
                name
                for name, module in policy.named_modules()
                if isinstance(module, torch.nn.Linear) and "visual" not in name and "lm_head" not in name
            ]
            torch.manual_seed(3)
            policy = get_peft_model(policy, LoraConfig(r=4, lora_alpha=8, target_modules=linear))
        for name, parameter in policy.named_parameters():
            if script.frozen_tower and "visual" in name:
                parameter.requires_grad = False
        self.reference = None if script.lora else copy.deepcopy(policy).eval()
        processor = AutoProcessor.from_pretrained(base)
        processor.pad_token_id = processor.tokenizer.pad_token_id
        processor.eos_token_id = processor.tokenizer.eos_token_id
        if script.max_pixels is not None:
            processor.image_processor.max_pixels = script.max_pixels
        self.script = script
        self.sampling = GenerationConfig(
            max_new_tokens=6, do_sample=True, temperature=1, num_return_sequences=script.generations,
            pad_token_id=processor.pad_token_id,
        )  # fmt: skip
        super().__init__(
            model=policy, args=args, data_collator=lambda rows: rows, train_dataset=dataset,
            processing_class=processor, callbacks=callbacks,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        [row] = inputs
        pictures = [Image.open(path) for path in row["image_path"]] if "image_path" in row else [row["image"]]
        text = self.processing_class.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        batch = self.processing_class(text=[text], images=pictures, return_tensors="pt")
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            ids = model.generate(**batch, generation_config=self.sampling)
        count = len(ids)
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": batch["pixel_values"].repeat(count, 1),
            "image_grid_thw": batch["image_grid_thw"].repeat(count, 1),
        }
        if "mm_token_type_ids" in batch:
            kinds = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, ids.shape[1] - length))
            whole["mm_token_type_ids"] = kinds.repeat(count, 1)
        ours = self.log_probabilities(model, whole, length)
        with torch.no_grad():
            if self.reference is None:
                with model.disable_adapter():
                    theirs = self.log_probabilities(model, whole, length)
            else:
                theirs = self.log_probabilities(self.reference, whole, length)
        rewards = torch.tensor([float(len(set(one.tolist()))) for one in ids[:, length:]])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        divergence = torch.exp(theirs - ours) - (theirs - ours) - 1
        gain = torch.exp(ours - ours.detach()) * advantages[:, None]
        return -(gain - self.script.beta * divergence).mean()

    def log_probabilities(self, model: Any, batch: dict[str, Any], length: int) -> torch.Tensor:
        logits = model(**batch).logits[:, length - 1 : -1]
        return logits.log_softmax(-1).gather(-1, batch["input_ids"][:, length:, None])[..., 0]


def trained(base: Path, folder: Path, script: Script, dataset: Any, callbacks: list[Any]) -> GroupTrainer:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "save_strategy": "steps",
        "save_steps": 2, "report_to": "none", "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True,
        "seed": 7, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **(settings | script.flags))
    trainer = GroupTrainer(base, args, script, dataset, callbacks)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return trainer


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_pinned_trainer_trains_the_same_and_what_leaves_it_is_right(name: str, qwen: Path, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    dataset = dataset_of(script, tmp_path)
    plain = trained(qwen, tmp_path / "plain", script, dataset, [])
    export = ExportCallback(tmp_path / "export", num_prompts=2, strict=True)
    callbacks = [KVCacheCallback(strict=True), ResumeGuardCallback(), export]
    ours = trained(qwen, tmp_path / "ours", script, dataset, callbacks)

    # A cache that plain rollouts were without (4.x) rounds otherwise: the same tokens, the same weights to 1e-6.
    for (key, mine), (_, theirs) in zip(
        sorted(ours.model.state_dict().items()), sorted(plain.model.state_dict().items()), strict=True
    ):
        assert torch.equal(mine, theirs) or (IS_V4 and torch.allclose(mine, theirs, atol=1e-6)), key
    assert export.result is not None
    assert export.result.verification is not None
    checks = {check.name: check.detail for check in export.result.verification.checks}
    assert "vision tower runs per request: 1" in checks["KV cache in use"]  # so it was asked with a picture
    assert diagnose_checkpoint(tmp_path / "export", base=qwen).is_clean
    if script.max_pixels is None:  # else the processor is not the base's: the doctor says so
        for folder in (tmp_path / "ours" / "checkpoint-2", tmp_path / "ours" / "saved"):
            found = diagnose_checkpoint(folder, base=qwen, reader=READER)
            assert found.is_clean, [str(finding) for finding in found.findings]
