"""Trainers other than GRPO's, models without a base folder, callbacks plugged late or twice, Hub pushes, rotation."""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
import trl
from packaging.version import Version
from transformers import AutoProcessor

from grpo_toolkit import ExportCallback, KVCacheCallback
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_model
from tests.support.models import build_llama
from tests.support.training import LANGUAGE_Q, grpo_trainer, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.stack

recent_trl_only = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="older TRL's trainers take their data in other forms"
)

SETTINGS: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
TEXT_REQUEST = Request(messages=[{"role": "user", "content": "Count."}], max_new_tokens=6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("bases") / "llama")


def sft(model: Any, output_dir: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": ["one two three", "four five six", "seven", "eight"]})
    settings = SFTConfig(output_dir=str(output_dir), **SETTINGS)
    return SFTTrainer(model=model, args=settings, train_dataset=data, callbacks=callbacks)


def dpo(model: Any, output_dir: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_dict({"prompt": ["a"] * 4, "chosen": [" yes"] * 4, "rejected": [" no"] * 4})
    settings = DPOConfig(output_dir=str(output_dir), **SETTINGS)
    return DPOTrainer(model=model, args=settings, train_dataset=data, callbacks=callbacks)


def rloo(model: Any, output_dir: Path, callbacks: list[Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    from tests.support.training import length_reward, rows

    settings = RLOOConfig(output_dir=str(output_dir), num_generations=2, max_completion_length=4, **SETTINGS)
    return RLOOTrainer(
        model=model,
        args=settings,
        reward_funcs=length_reward,
        train_dataset=rows(4, with_images=False),
        callbacks=callbacks,
    )


def plain(model: Any, output_dir: Path, callbacks: list[Any], **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    loaded = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
    tokens = torch.arange(3, 15).reshape(2, 6)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    settings = TrainingArguments(output_dir=str(output_dir), **(SETTINGS | options))
    tokenizer = AutoTokenizer.from_pretrained(model) if isinstance(model, str) else None
    return Trainer(
        model=loaded,
        args=settings,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def generation_flag(folder: Path) -> Any:
    """`use_cache` in generation_config.json; transformers 4.x leaves it out where it is true."""
    return json.loads((folder / "generation_config.json").read_text()).get("use_cache", True)


@pytest.mark.parametrize(
    ("make", "tags"),
    [
        (plain, None),
        pytest.param(sft, ["sft", "trl"], marks=recent_trl_only),
        pytest.param(dpo, ["dpo", "trl"], marks=recent_trl_only),
        pytest.param(rloo, ["rloo", "trl"], marks=recent_trl_only),
    ],
)
def test_other_trainers_save_and_export_as_grpo_does(
    make: Callable[..., Any], tags: list[str] | None, llama: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    callbacks = [KVCacheCallback(strict=True), ExportCallback(tmp_path / "export", strict=True)]
    trainer = make(str(llama), tmp_path / "out", callbacks)
    trainer.train()
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "export"):
        assert json.loads((folder / "config.json").read_text()).get("use_cache") is True
        assert generation_flag(folder) is True
        model, tokenizer, _ = load_model(folder)
        assert generate(model, tokenizer, TEXT_REQUEST).is_cached
    assert generate(trainer.model, tokenizer, TEXT_REQUEST).is_cached
    page = ModelCard.load(tmp_path / "export" / "README.md")
    assert page.data.tags == tags
    assert "`llama` fine-tuned for 1 steps." in page.text
    assert "GRPO" not in page.text


@pytest.mark.parametrize("late", [False, True])
def test_callbacks_plugged_late_or_twice_work_as_if_given_once(late: bool, llama: Path, tmp_path: Path) -> None:
    first, second = KVCacheCallback(strict=True), KVCacheCallback(strict=True)
    trainer = plain(str(llama), tmp_path, [] if late else [first, second])
    if late:
        trainer.add_callback(first)
        trainer.add_callback(second)
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["use_cache"] is True
    assert trainer.model.config.use_cache is True
    assert len(trainer.model._forward_pre_hooks) == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_model_of_no_folder_is_saved_with_its_own_defaults(late: bool, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
    model.config._name_or_path = ""
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    callback = KVCacheCallback(strict=True)
    trainer = plain(model, tmp_path / "out", [] if late else [callback])
    if late:  # Trainer.__init__ has set use_cache to False by then
        trainer.add_callback(callback)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True
    assert generation_flag(checkpoint) is True
    assert json.loads((checkpoint / "generation_config.json").read_text())["temperature"] == 0.5


def test_no_warning_of_gradient_checkpointing_is_left(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_warning()  # commands that ran in this process have made it quiet
    wants_cache = {"use_cache": True} if Version(transformers.__version__) >= Version("5.0") else {}
    said = {}
    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True)])):
        logging.Logger.warning_once.cache_clear()
        caplog.clear()
        plain(str(llama), tmp_path / name, callbacks, **wants_cache).train()
        said[name] = "incompatible with gradient checkpointing" in caplog.text
    assert said == {"plain": True, "ours": False}


def test_a_push_to_the_hub_uploads_files_that_are_right_already(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, RepoUrl

    uploaded: list[dict[str, Any]] = []

    def note_files(*_: object, folder_path: str, **options: Any) -> Any:
        # The first upload of 4.49 is of the output folder, into which it copies config and weights alone.
        found = [name for name in CONFIGS if Path(folder_path, name).is_file()]
        uploaded.append({name: json.loads(Path(folder_path, name).read_text()) for name in found})
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def make_repo(*_: object, **__: object) -> Any:
        return RepoUrl("https://huggingface.co/someone/llama")

    # transformers 5 asks HfApi; 4.x has imported the functions by name.
    monkeypatch.setattr(HfApi, "upload_folder", note_files)
    monkeypatch.setattr(HfApi, "create_repo", make_repo)
    monkeypatch.setattr("transformers.trainer.upload_folder", note_files, raising=False)
    monkeypatch.setattr("transformers.trainer.create_repo", make_repo, raising=False)
    monkeypatch.setattr("transformers.trainer.Trainer.create_model_card", lambda *args, **kwargs: None)
    trainer = plain(str(llama), tmp_path, [KVCacheCallback(strict=True)], push_to_hub=True, hub_token="hf_x")
    trainer.train()  # pushes while it saves, before on_save
    trainer.push_to_hub()
    assert len(uploaded) >= 2
    for files in uploaded:
        assert files["config.json"]["use_cache"] is True
    generation = [files["generation_config.json"] for files in uploaded if "generation_config.json" in files]
    assert generation
    assert all(config.get("use_cache", True) is True and config["temperature"] == 0.6 for config in generation)


CONFIGS = ("config.json", "generation_config.json")


@pytest.mark.parametrize("only_model", [False, True])
def test_rotation_keeps_the_right_checkpoints(only_model: bool, llama: Path, tmp_path: Path) -> None:
    callbacks = [KVCacheCallback(strict=True), ExportCallback(tmp_path / "export", strict=True)]
    trainer = plain(str(llama), tmp_path, callbacks, max_steps=4, save_total_limit=2, save_only_model=only_model)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").is_file() != only_model
    assert json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())["use_cache"] is True
    written = [(tmp_path / f"checkpoint-{step}").stat().st_mtime_ns for step in (3, 4)]
    assert written == sorted(written)


def test_an_adapter_checkpoint_has_the_files_of_a_plain_trainers(qwen: Path, tmp_path: Path) -> None:
    """But for tokenizer and processor, whose files are the base's own."""
    from peft import LoraConfig

    AutoProcessor.from_pretrained(qwen).save_pretrained(tmp_path / "processor")
    theirs = {path.name for path in (tmp_path / "processor").iterdir()}
    of_base = {path.name for path in qwen.iterdir()} - {"config.json", "generation_config.json", "model.safetensors"}
    names = {}
    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True)])):
        config = LoraConfig(r=2, target_modules=LANGUAGE_Q)
        saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        grpo_trainer(qwen, tmp_path / name, callbacks, peft_config=config, **saving).train()
        names[name] = {path.name for path in (tmp_path / name / "checkpoint-1").rglob("*")}
    assert theirs < names["plain"]
    assert names["ours"] == names["plain"] - theirs | of_base


@v5_only
def test_the_best_model_at_the_end_keeps_the_cache(llama: Path, tmp_path: Path) -> None:
    trainer = plain(
        str(llama),
        tmp_path,
        [KVCacheCallback(strict=True)],
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "best"))
    assert json.loads((tmp_path / "best" / "config.json").read_text())["use_cache"] is True
    assert trainer.model.config.use_cache is True
