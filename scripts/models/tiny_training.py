"""A real GRPO training of two steps on a tiny base, as the tests and some benchmarks run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Layers of the language model by either spelling of the names: `model.language_model.layers` since 4.52, before that
# `model.layers`. The tiny models' vision towers have none under `layers` that are called so, or say `vision`.
LANGUAGE_Q = r"(?!.*(vision|visual)).*q_proj"
LANGUAGE_QV = r"(?!.*(vision|visual)).*(q|v)_proj"


def rows(count: int = 8, *, with_images: bool = True) -> Any:
    """Return a dataset in the form that GRPOTrainer takes: conversational prompts, one image each."""
    from datasets import Dataset
    from PIL import Image

    columns: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": f"What is number {index}?"}] for index in range(count)],
        "answer": [str(index) for index in range(count)],
    }
    if with_images:
        columns["image"] = [Image.new("RGB", (56, 56), (index * 30, 80, 200 - index * 20)) for index in range(count)]
    return Dataset.from_dict(columns)


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward the number of distinct characters, or anything else that differs within a group."""
    return [float(len(set(str(completion)))) for completion in completions]


def grpo_trainer(
    model: Any, output_dir: Path, callbacks: list[Any] | None = None, *, with_images: bool = True, **options: Any
) -> Any:
    """Return a GRPOTrainer for two steps on CPU: four completions of eight tokens a prompt, checkpointing on."""
    import trl
    from packaging.version import Version
    from trl import GRPOConfig, GRPOTrainer

    peft_config = options.pop("peft_config", None)
    eval_dataset = options.pop("eval_dataset", None)
    processing_class = options.pop("processing_class", None)
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
        "disable_tqdm": True,
    }
    if Version(trl.__version__) < Version("1.16") and hasattr(model, "__fspath__"):
        # Random weights sample anything, and TRL 1.0 stops on a completion with an image token in it.
        config = json.loads(Path(model, "config.json").read_text())
        placeholders = [config[key] for key in ("image_token_id", "video_token_id") if key in config]
        settings["generation_kwargs"] = {"suppress_tokens": placeholders} if placeholders else None
    return GRPOTrainer(
        model=str(model) if hasattr(model, "__fspath__") else model,
        args=GRPOConfig(output_dir=str(output_dir), **(settings | options)),
        reward_funcs=length_reward,
        train_dataset=rows(with_images=with_images),
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=callbacks,
        peft_config=peft_config,
    )
