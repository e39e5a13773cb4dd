"""Tensors that a base stores and a save leaves out: what its class does not hold, and a tied head's second copy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.errors import CheckpointError, VerificationError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.preflight import look_ahead
from grpo_toolkit.export.verify import verify_export
from grpo_toolkit.merge.merge import merge_adapter
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.unheld_tensors import unheld_in_folder
from scripts.models.base_variants import WEIGHTS, build_text_base, change_weights, with_extras, with_second_head
from tests.support.training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GLM = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


def build(variant: str, folder: Path) -> Path:
    if variant == "head":
        return change_weights(build_text_base("Llama", folder, tie_word_embeddings=True), with_second_head)
    family, options = {"llama": ("Llama", {}), "qwen3_next": ("Qwen3Next", MOE), "glm4_moe": ("Glm4Moe", GLM)}[variant]
    return change_weights(build_text_base(family, folder, **options), with_extras)


VARIANTS = [
    "head",
    "llama",
    pytest.param("qwen3_next", marks=v5_only),  # stacks experts, and hides `mtp.*` from its loader's report
    pytest.param("glm4_moe", marks=v5_only),  # stacks also the experts of a layer that has no place
]


def shaken(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def extras(base: Path) -> set[str]:
    return {name for name in load_file(base / WEIGHTS) if "mtp" in name or "layers.2." in name or "inv_freq" in name}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_an_export_will_carry_is_said_before_the_training(variant: str, kind: str, tmp_path: Path) -> None:
    base = build(variant, tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*(q|v)_proj"))
    findings = list(look_ahead(model, tmp_path / "export", processing_class=tokenizer))
    assert [finding.is_obstacle for finding in findings] == ([] if variant == "head" else [False])
    carried = extras(base)
    for finding in findings:
        assert finding.what.startswith(f"{len(carried)} tensors in {base} ({min(carried)}, ")
        assert f"no place in a {type(base_model(model)).__name__}" in finding.what
        assert "the export carries them as they are" in finding.what


def test_a_tensor_that_is_not_saved_of_the_model_is_an_obstacle(tmp_path: Path) -> None:
    base = build_text_base("Llama", tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    del model.model.layers[1]
    [finding] = look_ahead(model, tmp_path / "export", processing_class=tokenizer)
    assert finding.is_obstacle
    assert "have a place in a LlamaForCausalLM, and are not among those that are saved of this model" in finding.what
    with pytest.raises(VerificationError):
        export_model(model, tmp_path / "export", processing_class=tokenizer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_fine_tune_is_stored_as_its_base_is(variant: str, tmp_path: Path) -> None:
    base = build(variant, tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    result = export_model(shaken(model), tmp_path / "export", processing_class=tokenizer)
    assert result.verification.passed
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (result.path, base))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in extras(base))
    trained = [name for name in ours if name not in extras(base) and "correction_bias" not in name]  # a buffer
    assert not any(ours[name].equal(theirs[name]) for name in trained)
    if variant == "head":
        assert ours["lm_head.weight"].equal(ours["model.embed_tokens.weight"])
    assert diagnose_checkpoint(result.path, base=base, deep=True).is_clean


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_by_the_names_of_projections_alone_is_merged(variant: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = build(variant, tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    result = export_model(adapted, tmp_path / "export", processing_class=tokenizer)
    assert result.verification.passed
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (result.path, base))
    changed = {name for name in theirs if not ours[name].equal(theirs[name])}
    assert changed
    assert not changed & extras(base)
    assert diagnose_checkpoint(result.path, base=base, deep=True).is_clean


def test_what_a_trainer_saves_of_such_a_base_is_no_fault_and_is_exported(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    trainer = grpo_trainer(base, tmp_path / "out", with_images=False, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not extras(checkpoint)
    codes = {finding.code for finding in diagnose_checkpoint(checkpoint, base=base).findings}
    assert not codes & {"tensors-missing", "tensors-extra", "unpublished-names"}
    said = {check.name: check for check in verify_export(checkpoint, base=base).checks}["tensors as in the base"]
    assert said.passed
    assert f"without {len(extras(base))} that its class does not need" in said.detail
    result = export_model(checkpoint, tmp_path / "export", base=base)
    assert result.verification.passed
    assert load_file(result.path / WEIGHTS).keys() == load_file(base / WEIGHTS).keys()


def test_what_is_added_to_many_files_is_in_their_index(tmp_path: Path) -> None:
    base = build("head", tmp_path / "base")
    change_weights(base, with_extras)
    model, tokenizer, _ = load_model(base)
    result = export_model(shaken(model), tmp_path / "export", processing_class=tokenizer, max_shard_size="20KB")
    assert result.verification.passed
    stored, wanted = open_checkpoint(result.path).tensors(), open_checkpoint(base).tensors()
    assert {name: (info.dtype, info.shape) for name, info in stored.items()} == {
        name: (info.dtype, info.shape) for name, info in wanted.items()
    }
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in stored.values())
    assert index["weight_map"]["mtp.norm.weight"] == stored["mtp.norm.weight"].file
    assert diagnose_checkpoint(result.path, base=base).is_clean


def test_what_the_class_holds_is_never_carried_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama", tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    original = type(model).save_pretrained

    def forgetful(self: Any, folder: Any, *, state_dict: Any, **kwargs: Any) -> None:
        state_dict = {name: tensor for name, tensor in state_dict.items() if "layers.1.mlp" not in name}
        original(self, folder, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(type(model), "save_pretrained", forgetful)
    with pytest.raises(VerificationError, match=r"tensors as in the base: \d+ missing"):
        export_model(shaken(model), tmp_path / "export", processing_class=tokenizer)


def test_a_torn_adapter_of_such_a_base_is_named_without_the_layers_that_have_no_place(tmp_path: Path) -> None:
    from tests.merge.test_merge import edit_weights, make_adapter

    base = build("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_weights(adapter, lambda name, t: None if "layers.1." in name else t)
    with pytest.raises(CheckpointError, match=r"for 1 modules .*: model.layers.1.self_attn.q_proj; it is not whole"):
        merge_adapter(adapter, tmp_path / "merged")


def test_the_loader_says_what_has_no_place(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    tensors = open_checkpoint(base).tensors()
    groups = {name: [name] for name in tensors if "layers" in name or "mtp" in name}
    assert unheld_in_folder(base, tensors, groups) == extras(base)
