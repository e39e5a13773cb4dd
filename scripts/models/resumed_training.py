"""A training that is saved under one stack and resumed under another: a step in each, and what was really loaded.

    python -m scripts.models.resumed_training save    MODEL BASE OUT     # in one environment: OUT/checkpoint-1
    python -m scripts.models.resumed_training resume  MODEL BASE OUT     # in another: goes on from it, to step 2

MODEL is a builder of tiny_bases.py, perhaps with `+lora`; BASE is made where it is not there, as it would be
published. Both leave in OUT what each parameter and its moments are, by their bytes alone: names and order differ
between the versions, so they are no witness. `resume` looks before its first step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import transformers

MOMENTS = ("exp_avg", "exp_avg_sq")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["save", "resume"])
    parser.add_argument("model", help="qwen2_5_vl, qwen2_5_vl+lora, qwen3_moe, llama")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plain", action="store_true", help="without callbacks of ours")
    options = parser.parse_args()
    name, _, lora = options.model.partition("+")
    if not options.base.exists():
        from scripts.models import tiny_bases
        from scripts.models.published_forms import FLAT, publish

        getattr(tiny_bases, f"build_{name}")(options.base)
        if name not in FLAT and int(transformers.__version__.split(".")[0]) >= 5:  # 4.x cannot read all that 5 saves
            publish(options.base)
    trainer, look = trainer_of(options, lora=bool(lora))
    checkpoint = options.out / "checkpoint-1"
    trainer.train(resume_from_checkpoint=str(checkpoint) if options.what == "resume" else None)
    (options.out / f"{options.what}.json").write_text(json.dumps(look.seen))
    return 0


def trainer_of(options: argparse.Namespace, *, lora: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

    from grpo_toolkit import KVCacheCallback, ResumeGuardCallback
    from grpo_toolkit.model.load import load_processor

    sees = "vision_config" in json.loads((options.base / "config.json").read_text())
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_pretrained(options.base)
    if lora:
        from peft import LoraConfig, get_peft_model

        from scripts.models.tiny_training import LANGUAGE_QV

        model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_QV, init_lora_weights=False))
    processor = load_processor(options.base)
    look = the_look()
    torch.manual_seed(3)
    arguments = TrainingArguments(
        output_dir=str(options.out), max_steps=1 if options.what == "save" else 2, per_device_train_batch_size=1,
        learning_rate=1e-3, save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, weight_decay=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"number": number} for number in range(4)],
        data_collator=lambda batch: batch_of(processor, batch[0]["number"], sees=sees),
        processing_class=processor,
        callbacks=[*([] if options.plain else [KVCacheCallback(strict=True), ResumeGuardCallback()]), look],
    )
    look.trainer = trainer
    return trainer, look


def batch_of(processor: Any, number: int, *, sees: bool) -> dict[str, Any]:
    from PIL import Image

    from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
    from grpo_toolkit.model.generation.request import Request

    images = [Image.new("RGB", (56, 56), (number * 40, 90, 120))] if sees else []
    messages = [{"role": "user", "content": f"What is number {number}?"}]
    batch = dict(prepare_inputs(processor, [Request(messages=messages, images=images)]))
    return {**batch, "labels": batch["input_ids"].clone()}


def the_look() -> Any:
    from transformers import TrainerCallback

    class Look(TrainerCallback):  # type: ignore[misc]
        """A callback that notes what was saved, and what a resume begins with."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.seen: dict[str, Any] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                self.seen = weights_and_moments(self.trainer)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.seen = weights_and_moments(self.trainer)

    return Look()


def weights_and_moments(trainer: Any) -> dict[str, list[str]]:
    """Return the moments of each weight, both as digests; a stack of experts as its parts."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {}
    for parameter in trainer.model.parameters():
        state = optimizer.state.get(parameter, {})
        moments = [split(state[key]) for key in MOMENTS if key in state]
        for index, part in enumerate(split(parameter.detach())):
            found[digest(part)] = [digest(moment[index]) for moment in moments]
    return found


def split(tensor: Any) -> list[Any]:
    """Return the matrices that 4.x trains where transformers 5 has a stack of experts: gate above up."""
    if tensor.ndim != 3:
        return [tensor]
    parts = 2 if tensor.shape[1] == 48 else 1  # gate_up_proj of tiny_bases.build_qwen3_moe, and not down_proj
    return [part for expert in tensor for part in expert.chunk(parts)]


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
