"""A trainer's own saves: they load wherever their base loads, and say what training changed."""

from __future__ import annotations

import json
import pickle
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import huggingface_hub
import pytest
import transformers
from packaging.version import Version

from grpo_toolkit import ResumeGuardCallback, diagnose_checkpoint
from grpo_toolkit.callbacks import KVCacheCallback
from grpo_toolkit.checkpoint.folders.lineage import BASE_RECORD
from grpo_toolkit.model.load import load_model, load_processor
from grpo_toolkit.model.saving.processor_hook import hook_processor
from grpo_toolkit.model.saving.save_hook import capture_model_defaults, install_save_hook
from scripts.models.base_variants import change_json
from tests.support.models import build_llama
from tests.support.steps import content
from tests.support.training import LANGUAGE_QV, grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

PROCESSOR_FILES = (
    "chat_template.json", "merges.txt", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def expected_config(base: Path, dtype: str) -> dict[str, Any]:
    return config(base) | {"torch_dtype": dtype, "transformers_version": transformers.__version__}


@pytest.fixture(scope="module")
def saved(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that a training leaves, by a checkpoint, `save_model` and a user's own calls."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = grpo_trainer(qwen, folder / "out", [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    trainer.model.save_pretrained(folder / "by-hand")
    trainer.processing_class.save_pretrained(folder / "by-hand")
    return {"checkpoint": folder / "out" / "checkpoint-1", "saved": folder / "saved", "by-hand": folder / "by-hand"}


@pytest.mark.parametrize("kind", ["checkpoint", "saved", "by-hand"])
def test_a_save_has_the_bases_forms(kind: str, saved: dict[str, Path], qwen: Path) -> None:
    folder = saved[kind]
    assert config(folder) == expected_config(qwen, "float32")
    base, found = content(qwen), content(folder)
    carried = [name for name in PROCESSOR_FILES if name in base]
    assert len(carried) >= 3
    assert {name: found[name] for name in carried} == {name: base[name] for name in carried}
    assert not {"processor_config.json", "chat_template.jinja"} & (found.keys() - base.keys())
    assert diagnose_checkpoint(folder, base=qwen).is_clean
    model, _, report = load_model(folder)
    assert report.is_clean
    assert model.generation_config.temperature == load_model(qwen)[0].generation_config.temperature


def test_a_switch_leaves_the_librarys_own_forms(qwen: Path, tmp_path: Path) -> None:
    plain = load_model(qwen)[0]
    plain.save_pretrained(tmp_path / "plain")
    model = load_model(qwen)[0]
    install_save_hook(model, capture_model_defaults(model), portable=False)
    model.save_pretrained(tmp_path / "ours")
    assert content(tmp_path / "ours").keys() - {BASE_RECORD} == content(tmp_path / "plain").keys()
    assert config(tmp_path / "ours").keys() == config(tmp_path / "plain").keys()
    trainer = grpo_trainer(qwen, tmp_path / "out", [KVCacheCallback(portable_saves=False)])
    assert "save_pretrained" not in vars(trainer.processing_class)


def test_the_config_says_the_dtype_that_was_saved_and_what_was_changed(qwen: Path, tmp_path: Path) -> None:
    import torch

    model = load_model(qwen)[0].to(torch.bfloat16)
    install_save_hook(model, capture_model_defaults(model))
    model.config.get_text_config().max_position_embeddings = 77
    model.save_pretrained(tmp_path)
    assert config(tmp_path) == expected_config(qwen, "bfloat16") | {"max_position_embeddings": 77}
    assert type(model).from_pretrained(tmp_path, torch_dtype="auto").dtype == torch.bfloat16


def test_another_model_made_of_the_base_keeps_its_own_config(tmp_path: Path) -> None:
    """A reward model's head, say: the base's config would name the base's class."""
    from transformers import AutoModelForSequenceClassification

    base = build_llama(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    install_save_hook(model, capture_model_defaults(model))
    model.save_pretrained(tmp_path / "saved")
    assert config(tmp_path / "saved")["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config(tmp_path / "saved")["id2label"]) == 3


def test_tokenizer_and_processor_beside_an_adapter_are_the_bases(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = grpo_trainer(
        qwen, tmp_path, [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=2,
        peft_config=LoraConfig(r=4, target_modules=LANGUAGE_QV),
    )  # fmt: skip
    trainer.train()
    base, found = content(qwen), content(tmp_path / "checkpoint-2")
    assert "config.json" not in found
    assert {name: found[name] for name in PROCESSOR_FILES if name in base} == {
        name: base[name] for name in PROCESSOR_FILES if name in base
    }


def test_a_changed_processor_is_saved_as_it_is_in_forms_that_older_versions_read(qwen: Path, tmp_path: Path) -> None:
    processor = load_processor(qwen)
    processor.chat_template = "{{ messages }} changed"
    processor.tokenizer.chat_template = processor.chat_template
    hook_processor(processor, qwen)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert again.chat_template == processor.chat_template
    shutil.copyfile(qwen / "config.json", tmp_path / "config.json")
    shutil.copyfile(qwen / "model.safetensors", tmp_path / "model.safetensors")
    unloadable = [
        finding for finding in diagnose_checkpoint(tmp_path).findings if finding.severity.value == "unloadable"
    ]
    assert unloadable == []


def test_a_text_trainer_of_a_vlm_saves_the_whole_processor(qwen: Path, tmp_path: Path) -> None:
    tokenizer = load_processor(qwen).tokenizer
    hook_processor(tokenizer, qwen)
    tokenizer.save_pretrained(tmp_path)
    assert content(tmp_path).items() <= content(qwen).items()
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_a_hooked_processor_is_copied_and_pickled(qwen: Path, tmp_path: Path) -> None:
    import copy

    processor = load_processor(qwen)
    hook_processor(processor, qwen)
    copied = copy.deepcopy(processor)
    copied.tokenizer.model_max_length = 55
    copied.save_pretrained(tmp_path / "copied")
    processor.save_pretrained(tmp_path / "own")
    lengths = [load_processor(tmp_path / name).tokenizer.model_max_length for name in ("copied", "own")]
    assert lengths[0] == 55
    assert lengths[1] != 55
    pickle.loads(pickle.dumps(processor)).save_pretrained(tmp_path / "pickled")


def test_a_push_in_the_call_comes_after_the_rewrite(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        assert options == {"private": True, "token": "t", "exist_ok": True}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(
        self: Any, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **options: Any
    ) -> None:
        found = content(folder_path)
        sent.append({"to": repo_id, "files": {name: found[name] for name in allow_patterns}, **options})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    model, processor, _ = load_model(qwen)
    install_save_hook(model, capture_model_defaults(model))
    hook_processor(processor, qwen)
    (tmp_path / "notes.txt").write_text("mine")
    hub = {"push_to_hub": True, "repo_id": "policy", "token": "t", "private": True, "commit_message": "Done"}
    model.save_pretrained(tmp_path, **hub)
    processor.save_pretrained(tmp_path, **hub)
    weights, texts = sent
    assert weights["to"] == texts["to"] == "me/policy"
    assert weights["commit_message"] == "Done"
    assert json.loads(weights["files"]["config.json"]) == expected_config(qwen, "float32")
    assert "model.safetensors" in weights["files"]
    assert "notes.txt" not in weights["files"]
    assert texts["files"]["tokenizer_config.json"] == (qwen / "tokenizer_config.json").read_bytes()


LLAMA_3: Final = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_checkpoint_of_llama_3_can_be_resumed_by_any_trainer(tmp_path: Path) -> None:
    """transformers 5.24 raises at a resume where a checkpoint's config is spelled as Llama 3's base is published."""
    base = build_llama(tmp_path / "base")
    change_json(base, "config.json", as_llama_3)
    trainer = grpo_trainer(
        base, tmp_path / "out", [KVCacheCallback(strict=True)], with_images=False, save_strategy="steps", save_steps=1
    )
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    trainer.save_model(str(tmp_path / "saved"))
    assert config(tmp_path / "saved")["rope_scaling"] == LLAMA_3  # which is no checkpoint: every version reads it

    def resume(name: str, callbacks: list[Any]) -> Any:
        resumed = grpo_trainer(base, tmp_path / name, callbacks, with_images=False)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        return resumed.model.state_dict()

    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True), ResumeGuardCallback()])):
        again = resume(name, callbacks)
        assert all(tensor.equal(again[key]) for key, tensor in trainer.model.state_dict().items())

    change_json(checkpoint, "config.json", as_llama_3)  # as a training under 4.x leaves it
    if is_refused(checkpoint):
        with pytest.raises(AttributeError, match="max_position_embeddings"):
            resume("fault", [])
    again = resume("cure", [ResumeGuardCallback()])
    assert all(tensor.equal(again[key]) for key, tensor in trainer.model.state_dict().items())
    assert is_refused(checkpoint) is (Version(transformers.__version__) >= Version("5.24"))  # nothing stays watched


def as_llama_3(content: dict[str, Any]) -> None:
    content.pop("rope_parameters", None)
    content |= {"rope_theta": 5e5, "rope_scaling": LLAMA_3}


def is_refused(checkpoint: Path) -> bool:
    try:
        transformers.PretrainedConfig.from_json_file(str(checkpoint / "config.json"))
    except AttributeError:
        return True
    return False
