"""TRL's published examples for models with images, by their flags and data paths, with our callbacks and without.

Each builds its trainer from the three groups of flags of `TrlParser`, as examples/scripts/*_vlm.py do;
`trl/scripts/grpo.py` is run as it is in tests/cli/test_run.py. The flags are those of their docstrings, where a CPU
without vLLM has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trl
from packaging.version import Version
from PIL import Image

from grpo_toolkit import ExportCallback, KVCacheCallback, ResumeGuardCallback, diagnose_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the examples of TRL 1.16"),
]

SYSTEM_PROMPT = "The assistant first thinks, within <think></think> tags, and then answers."
LORA = "--use_peft --lora_r 4 --lora_target_modules"
GROUPS = (
    f"--learning_rate 1e-3 --max_completion_length 8 --num_generations 2 --per_device_train_batch_size 2 "
    f"--log_completions {LORA} q_proj v_proj"
)
SMALL = (
    "--max_steps 2 --dtype bfloat16 --bf16 False --use_cpu True --report_to none --save_strategy steps --save_steps 2 "
    "--logging_steps 1 --seed 7 --disable_tqdm True"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example: its trainer, its flags, its rows, and whether it loads the model itself."""

    trainer: str
    flags: str
    rows: Callable[[], dict[str, list[Any]]]
    loads_model: bool = False


def pictures() -> list[Any]:
    return [Image.new("RGB", (56, 56), (number * 50, 80, 120)) for number in range(4)]


def problems() -> dict[str, list[Any]]:
    """Return the columns of lmms-lab/multimodal-open-r1-8k-verified."""
    return {
        "image": pictures(),
        "problem": [f"What is number {number}?" for number in range(4)],
        "solution": [f"${number}$" for number in range(4)],
    }


def conversations() -> dict[str, list[Any]]:
    """Return the columns of HuggingFaceH4/llava-instruct-mix-vsft."""
    return {
        "messages": [said("What is this?", "A square.") for _ in range(4)],
        "images": [[one] for one in pictures()],
    }


def preferences() -> dict[str, list[Any]]:
    """Return the columns of HuggingFaceH4/rlaif-v_formatted."""
    prompt, chosen = said("What is this?", "A square.")
    _, rejected = said("", "A circle.")
    return {
        "prompt": [[prompt]] * 4,
        "chosen": [[chosen]] * 4,
        "rejected": [[rejected]] * 4,
        "images": [[one] for one in pictures()],
    }


def said(question: str, answer: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


EXAMPLES = {
    "grpo_vlm": Example(trainer="GRPO", flags=GROUPS, rows=problems),
    "gspo_vlm": Example(
        trainer="GRPO",
        flags=f"{GROUPS} --importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 "
        "--loss_type grpo --gradient_accumulation_steps 2 --steps_per_generation 4",
        rows=problems,
    ),
    "rloo_vlm": Example(trainer="RLOO", flags=GROUPS, rows=problems),
    "sft_vlm": Example(
        trainer="SFT",
        flags="--learning_rate 1e-3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 "
        f"{LORA} down_proj o_proj k_proj q_proj gate_proj up_proj v_proj",
        rows=conversations,
        loads_model=True,
    ),
    "dpo_vlm": Example(
        trainer="DPO",
        flags=f"--learning_rate 1e-3 --per_device_train_batch_size 2 {LORA} all-linear",
        rows=preferences,
        loads_model=True,
    ),
    "online_dpo_vlm": Example(
        trainer="OnlineDPO",
        flags="--learning_rate 1e-3 --max_length 512 --max_new_tokens 8 --per_device_train_batch_size 1 "
        f"--gradient_accumulation_steps 2 {LORA} q_proj v_proj",
        rows=problems,
        loads_model=True,
    ),
}


def trained(name: str, base: Path, folder: Path, data: Path, callbacks: list[Any]) -> Any:
    """Build the trainer as the example does, train, and save as it does."""
    from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

    example = EXAMPLES[name]
    config, trainer_class = classes_of(example.trainer)
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    flags = f"--model_name_or_path {base} --dataset_name {data} --output_dir {folder} {example.flags} {SMALL}"
    script, settings, model_settings = parser.parse_args_and_config(args=flags.split())
    loading = {
        "revision": model_settings.model_revision,
        "attn_implementation": model_settings.attn_implementation,
        "dtype": getattr(torch, model_settings.dtype),
    }
    options: dict[str, Any] = {"callbacks": callbacks, "peft_config": get_peft_config(model_settings)}
    if example.trainer == "SFT":
        settings.max_length = None
    if example.rows is problems:
        options["reward_funcs"] = rewards()
    if example.loads_model:
        options["model"] = loaded(base, example.trainer, settings, loading)
    else:
        options["model"] = model_settings.model_name_or_path
        settings.model_init_kwargs = loading
    if example.trainer == "OnlineDPO":
        from transformers import AutoProcessor

        options["processing_class"] = AutoProcessor.from_pretrained(base)
        options["processing_class"].tokenizer.padding_side = "left"
    trainer = trainer_class(args=settings, train_dataset=dataset_of(script.dataset_name, example, folder), **options)
    trainer.train()
    trainer.save_model(settings.output_dir)
    return trainer


def classes_of(name: str) -> tuple[Any, Any]:
    if name == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        return OnlineDPOConfig, OnlineDPOTrainer
    return getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")


def rewards() -> list[Any]:
    from trl.rewards import think_format_reward

    def varied(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(set(str(completion)))) for completion in completions]

    return [think_format_reward, varied]  # random weights earn the same of the first


def loaded(base: Path, trainer: str, settings: Any, loading: dict[str, Any]) -> Any:
    """Load the model as an example that does so itself.

    online_dpo_vlm.py also passes `use_cache=`, which transformers 5 refuses (TypeError): there it is set afterwards.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, **loading)
    if trainer == "OnlineDPO":
        settings.gradient_checkpointing_kwargs = {"use_reentrant": True}
        model.config.use_cache = False
    return model


def dataset_of(source: str, example: Example, folder: Path) -> Any:
    from datasets import load_dataset

    dataset = load_dataset(source, split="train", cache_dir=str(folder / "cache"))
    if example.rows is not problems:
        return dataset
    dataset = dataset.map(conversation)
    dataset = dataset.filter(lambda row: row["image"].size[0] < 512 and row["image"].size[1] < 512)
    return dataset.map(lambda row: {"image": row["image"].convert("RGB")})


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    system, user = {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["problem"]}
    return {"prompt": [system, user]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_the_same_and_exports(name: str, base: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "data").mkdir()
    Dataset.from_dict(EXAMPLES[name].rows()).to_parquet(tmp_path / "data" / "train.parquet")
    plain = trained(name, base, tmp_path / "plain", tmp_path / "data", [])
    export = ExportCallback(tmp_path / "export", num_prompts=1, strict=True)
    callbacks = [KVCacheCallback(strict=True), ResumeGuardCallback(), export]
    ours = trained(name, base, tmp_path / "ours", tmp_path / "data", callbacks)

    before, after = plain.model.state_dict(), ours.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "plain" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "ours" / "adapter_model.safetensors"
    ).read_bytes()
    assert export.result is not None
    assert export.result.verification is not None
    checks = {check.name: check.detail for check in export.result.verification.checks}
    assert "vision tower runs per request: 1" in checks["KV cache in use"]  # so it was asked with a picture
    assert diagnose_checkpoint(tmp_path / "export", base=base).is_clean
