"""Saved files: what a plain trainer leaves in them, and what the hook makes of it."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.callbacks import KVCacheCallback
from grpo_toolkit.checkpoint.folders.lineage import BASE_RECORD, recorded_base
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.export.export import export_model
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.kv_cache import cache_flags
from grpo_toolkit.model.load import load_model, load_processor
from grpo_toolkit.model.saving.save_hook import capture_model_defaults, install_save_hook, save_as_plain_trainer
from tests.support.training import grpo_trainer, nested_config_only, v5_only

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.generation.request import Request

pytestmark = pytest.mark.stack


def read(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / name).read_text())
    data.pop("transformers_version", None)
    return data


def flags(node: dict[str, Any], here: str = "") -> dict[str, Any]:
    found = {here or ".": node["use_cache"]} if "use_cache" in node else {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= flags(value, f"{here}.{key}" if here else key)
    return found


@pytest.fixture
def poisoned(qwen: Path, tmp_path: Path) -> Path:
    """A base as VLM-R1 and its descendants leave it under transformers 4.x."""
    folder = tmp_path / "poisoned"
    shutil.copytree(qwen, folder)
    generation = json.loads((qwen / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "use_cache": False}))
    return folder


@v5_only
def test_a_plain_trainer_leaks_the_switch_and_the_callback_does_not(any_base: Path, tmp_path: Path) -> None:
    found = {}
    with_images = "llama" not in any_base.name
    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True)])):
        trainer = grpo_trainer(
            any_base, tmp_path / name, callbacks, with_images=with_images, save_strategy="steps", save_steps=1
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name / "saved"))
        trainer.model.save_pretrained(tmp_path / name / "by-hand")
        found[name] = [
            flags(read(tmp_path / name / folder, "config.json")) for folder in ("checkpoint-1", "saved", "by-hand")
        ]
    assert all(flags.get(".") is False for flags in found["plain"])
    assert found["ours"] == [flags(read(any_base, "config.json"))] * 3


def test_every_save_names_its_base_and_an_export_of_it_is_compared(qwen: Path, tmp_path: Path) -> None:
    """A full checkpoint names its base nowhere, so a forgotten `--base` compared it with nothing, in silence."""
    callback = KVCacheCallback(strict=True)
    trainer = grpo_trainer(qwen, tmp_path / "run", [callback], save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "saved"):
        assert recorded_base(folder) == qwen.resolve()
        diagnosis = diagnose_checkpoint(folder)
        assert diagnosis.base == qwen.resolve()
        assert diagnosis.not_judged == ()
    result = export_model(tmp_path / "saved", tmp_path / "export")
    assert result is not None
    assert result.base == qwen.resolve()
    (tmp_path / "saved" / BASE_RECORD).unlink()
    alone = export_model(tmp_path / "saved", tmp_path / "alone", verify=False)
    assert alone is not None
    assert alone.base is None
    assert alone.sources["base"].startswith("NONE: no base was named")
    assert json.loads((tmp_path / "alone" / "grpo_toolkit.json").read_text())["base"] is None


def test_generation_defaults_are_the_bases_in_every_save(qwen: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(qwen, tmp_path, [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    wanted = read(qwen, "generation_config.json")
    assert read(tmp_path / "checkpoint-2", "generation_config.json") == wanted
    assert read(tmp_path / "saved", "generation_config.json") == wanted
    assert wanted["temperature"] == 1e-06


def test_overrides_reach_every_save(qwen: Path, tmp_path: Path) -> None:
    callback = KVCacheCallback(generation_overrides={"max_new_tokens": 77}, strict=True)
    trainer = grpo_trainer(qwen, tmp_path, [callback], save_strategy="steps", save_steps=2)
    trainer.train()
    wanted = read(qwen, "generation_config.json") | {"max_new_tokens": 77}
    assert read(tmp_path / "checkpoint-2", "generation_config.json") == wanted


@pytest.mark.parametrize("overrides", [{"cache_implementation": "no-such-cache"}, {"max_new_tokens": -3}])
def test_overrides_that_do_not_fit_are_said_before_training_and_cost_no_checkpoint(
    qwen: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    callback = KVCacheCallback(generation_overrides=overrides)
    trainer = grpo_trainer(qwen, tmp_path, [callback], save_strategy="steps", save_steps=2)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert all("do not fit the base" in failure for failure in callback.failures)
    assert callback.failures


def test_greedy_overrides_drop_the_settings_of_sampling(qwen: Path, tmp_path: Path) -> None:
    callback = KVCacheCallback(generation_overrides={"do_sample": False}, strict=True)
    grpo_trainer(qwen, tmp_path, [callback], save_strategy="steps", save_steps=2).train()
    wanted = read(qwen, "generation_config.json") | {"do_sample": False}
    del wanted["temperature"]
    found = read(tmp_path / "checkpoint-2", "generation_config.json")
    assert {key: found.get(key, False) for key in wanted} == wanted
    assert "temperature" not in found


def test_a_users_own_change_of_the_generation_config_wins(qwen: Path, tmp_path: Path) -> None:
    model = load_model(qwen)[0]
    install_save_hook(model, capture_model_defaults(model))
    model.generation_config.temperature = 0.33
    model.generation_config.use_cache = False
    model.save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved", "generation_config.json") == (
        read(qwen, "generation_config.json") | {"temperature": 0.33}
    )


def test_a_poisoned_base_decodes_without_a_cache_and_is_put_right(
    poisoned: Path, tmp_path: Path, image_request: Request, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor, _ = load_model(poisoned)
    assert not generate(model, processor, image_request).is_cached  # the fault, as a user of that base has it

    trainer = grpo_trainer(
        poisoned, tmp_path / "out", [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=1
    )
    trainer.train()
    said = [record.message for record in caplog.records if "rollouts would have run without a cache" in record.message]
    assert len(said) == 1
    assert str(poisoned) in said[0]
    for folder in ("checkpoint-1", "checkpoint-2"):
        # transformers 4.x leaves out what equals its default, true.
        assert read(tmp_path / "out" / folder, "generation_config.json").get("use_cache", True) is True
        cured, processor, _ = load_model(tmp_path / "out" / folder)
        assert generate(cured, processor, image_request).is_cached


def test_rollouts_from_a_poisoned_base_run_with_a_cache(poisoned: Path, tmp_path: Path) -> None:
    lengths = {}
    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True)])):
        trainer = grpo_trainer(poisoned, tmp_path / name, callbacks, max_steps=1)
        fed: list[int] = []
        handle = trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, fed=fed: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        handle.remove()
        lengths[name] = fed
    # The rollout comes first: prompt, then seven more forwards for eight tokens; log-probabilities after it.
    prompt = lengths["ours"][0]
    assert lengths["ours"][1:8] == [1] * 7
    assert lengths["plain"][1:8] == [prompt + step for step in range(1, 8)]


@v5_only
def test_training_state_is_back_after_a_save(qwen: Path, tmp_path: Path) -> None:
    model = load_model(qwen)[0]
    install_save_hook(model, capture_model_defaults(model), portable=False)
    model.config.use_cache = False
    model.config.text_config.use_cache = False
    model.generation_config.pad_token_id = 7
    generation_config = model.generation_config
    model.save_pretrained(tmp_path / "saved")
    assert cache_flags(model.config) == {(): False, ("text_config",): False}
    assert model.generation_config is generation_config
    assert model.generation_config.pad_token_id == 7
    assert flags(read(tmp_path / "saved", "config.json")) == {"text_config": True}


@nested_config_only
def test_a_deep_copy_has_a_hook_of_its_own(qwen: Path, tmp_path: Path) -> None:
    model = load_model(qwen)[0]
    install_save_hook(model, capture_model_defaults(model))
    copied = copy.deepcopy(model)
    assert copied.save_pretrained.__self__ is copied
    install_save_hook(copied, capture_model_defaults(copied, overrides={"max_new_tokens": 5}))
    copied.config.use_cache = False
    assert "use_cache" not in vars(model.config)
    copied.save_pretrained(tmp_path / "copied")
    model.save_pretrained(tmp_path / "model")
    assert read(tmp_path / "copied", "generation_config.json")["max_new_tokens"] == 5
    assert "max_new_tokens" not in read(tmp_path / "model", "generation_config.json")
    assert "use_cache" not in read(tmp_path / "copied", "config.json")


def test_a_pickled_model_loads_and_saves(qwen: Path, tmp_path: Path) -> None:
    model = load_model(qwen)[0]
    install_save_hook(model, capture_model_defaults(model))
    loaded = pickle.loads(pickle.dumps(model))
    loaded.save_pretrained(tmp_path / "loaded")
    assert (tmp_path / "loaded" / "model.safetensors").is_file()


@nested_config_only
def test_without_a_base_folder_a_snapshot_serves(qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(qwen))
    model.config._name_or_path = ""
    trainer_put_it_there = False
    model.config.use_cache = trainer_put_it_there
    model.config.text_config.use_cache = False
    defaults = capture_model_defaults(model)
    assert defaults.source == "live model"
    assert defaults.cache_levels == {("text_config",)}  # the class declares that one, and knows nothing of the other
    install_save_hook(model, defaults)
    model.save_pretrained(tmp_path)
    assert flags(read(tmp_path, "config.json")) == {".": True}  # moved to the top, as the family is published


def test_a_late_plug_still_hooks_the_saves(qwen: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(qwen, tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(KVCacheCallback(strict=True))
    trainer.train()
    assert flags(read(tmp_path / "checkpoint-2", "config.json")) == flags(read(qwen, "config.json"))


def test_the_plain_save_is_what_a_plain_trainer_writes(qwen: Path, tmp_path: Path) -> None:
    plain = grpo_trainer(qwen, tmp_path / "plain")
    plain.train()
    plain.save_model(str(tmp_path / "theirs"))
    ours = grpo_trainer(qwen, tmp_path / "ours", [KVCacheCallback(strict=True)])
    ours.train()
    save_as_plain_trainer(ours.model, tmp_path / "measured", ours.processing_class)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert cache_flags(ours.model.config) == {("text_config",): True}


def other_eos(base: Path, folder: Path) -> Path:
    """A base whose own generation config ends answers with another token than its tokenizer's."""
    shutil.copytree(base, folder)
    generation = read(base, "generation_config.json")
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 3}))
    return folder


def test_an_eos_that_a_script_sets_after_training_is_saved_and_exported(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """open-r1 does; the ids that the trainer aligned before the training are not the user's."""
    base = other_eos(qwen, tmp_path / "base")
    trainer = grpo_trainer(base, tmp_path / "out", [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=2)
    trainer.train()
    eos = trainer.processing_class.tokenizer.eos_token_id
    assert eos != 3
    assert f"the tokenizer's {eos} is not among them" in caplog.text
    assert read(tmp_path / "out" / "checkpoint-2", "generation_config.json") == read(base, "generation_config.json")
    trainer.save_model(str(tmp_path / "untouched"))
    assert read(tmp_path / "untouched", "generation_config.json") == read(base, "generation_config.json")

    trainer.model.generation_config.eos_token_id = eos
    trainer.save_model(str(tmp_path / "saved"))
    wanted = read(base, "generation_config.json") | {"eos_token_id": eos}
    assert read(tmp_path / "saved", "generation_config.json") == wanted
    assert f"eos_token_id in generation_config.json is {eos}, as set" in caplog.text
    export_model(trainer, tmp_path / "export", verify=False)
    assert read(tmp_path / "export", "generation_config.json") == wanted


def test_an_id_that_a_script_sets_in_the_middle_of_a_training_is_in_its_next_checkpoint(
    qwen: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Sets(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            model.generation_config.eos_token_id = 5

    callbacks = [KVCacheCallback(strict=True), Sets()]
    trainer = grpo_trainer(qwen, tmp_path, callbacks, save_strategy="steps", save_steps=2)
    trainer.train()
    assert read(tmp_path / "checkpoint-2", "generation_config.json")["eos_token_id"] == 5
    assert trainer.model.generation_config.eos_token_id == 5
    assert trainer.model.generation_config.pad_token_id == read(qwen, "generation_config.json").get("pad_token_id")


def test_an_eos_that_sft_was_asked_for_is_saved(qwen: Path, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    if not hasattr(trl.SFTConfig, "eos_token"):
        pytest.skip("this TRL has no such option")
    tokenizer = load_processor(qwen).tokenizer
    token = next(name for name in tokenizer.all_special_tokens if name != tokenizer.eos_token)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), eos_token=token, max_steps=1, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_dict({"text": ["What is this?"] * 8})
    trainer = trl.SFTTrainer(
        str(qwen),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[KVCacheCallback(strict=True)],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    eos = read(tmp_path / "saved", "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(token) in eos
