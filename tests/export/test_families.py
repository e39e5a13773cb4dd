"""Families whose names and ties are told in several ways: each exported, verified and examined beside its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.export.export import export_model
from grpo_toolkit.model.live_model import is_tied
from grpo_toolkit.model.load import load_model
from scripts.models.base_variants import WEIGHTS, build_vlm, change_weights, with_inner_vision_model
from scripts.models.families import build_family
from scripts.models.published_forms import publish
from scripts.models.tiny_bases import build_llava
from tests.support.training import v5_only

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.export.export_result import ExportResult
    from grpo_toolkit.model.generation.request import Request

pytestmark = [pytest.mark.stack, v5_only]


def under_live_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights as the live model spells them, which is how `state_dict` saves them."""
    heads = {name: name.removeprefix("language_model.") for name in weights if ".lm_head." in name}
    texts = {name: name.replace("language_model.model.", "model.language_model.") for name in weights}
    names = {name: text if text != name else f"model.{name}" for name, text in texts.items()} | heads
    return {names[name]: tensor for name, tensor in weights.items()}


FORMS: dict[str, Any] = {"v5": dict, "published": with_inner_vision_model, "live": under_live_names}


def build(family: str, folder: Path, form: str = "v5", **options: Any) -> Path:
    base = build_llava(folder) if family == "LLaVA" else build_vlm(family, folder, **options)
    return change_weights(base, FORMS[form])


def train(base: Path, kind: str) -> tuple[torch.nn.Module, Any]:
    """Load the base, and change all its weights or give it an adapter, as a training would."""
    from peft import LoraConfig, get_peft_model

    model, processor, _ = load_model(base)
    torch.manual_seed(1)
    if kind == "lora":
        options = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "init_lora_weights": False}
        return get_peft_model(model, LoraConfig(r=2, **options)), processor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model, processor


def exported(base: Path, output: Path, kind: str, requests: list[Request]) -> ExportResult:
    model, processor = train(base, kind)
    result = export_model(model, output, processing_class=processor, requests=requests)
    assert result is not None
    assert result.verification is not None
    assert result.verification.passed
    return result


@pytest.mark.parametrize(
    ("family", "form", "kind"),
    [
        ("Gemma3", "v5", "full"),
        ("Gemma3", "live", "full"),
        ("Gemma3", "published", "lora"),
        ("PaliGemma", "v5", "lora"),
        ("LLaVA", "v5", "full"),
        ("LLaVA", "live", "lora"),
    ],
)
def test_an_export_is_clean_beside_its_base_however_that_spells_its_names(
    family: str, form: str, kind: str, tmp_path: Path, image_request: Request
) -> None:
    base = build(family, tmp_path / "base", form)
    result = exported(base, tmp_path / "export", kind, [image_request])
    names = set(open_checkpoint(result.path).tensors())
    assert names == set(
        open_checkpoint(change_weights(build(family, tmp_path / "p"), with_inner_vision_model)).tensors()
    )
    diagnosis = diagnose_checkpoint(result.path, base=base, deep=True)
    assert [finding.code for finding in diagnosis.findings if finding.severity.value != "note"] == []


def test_a_tensor_that_is_lost_is_missed_beside_a_base_of_other_names(tmp_path: Path) -> None:
    base = build("Gemma3", tmp_path / "base")
    folder = build("Gemma3", tmp_path / "folder", "published")
    lost = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    change_weights(folder, lambda weights: {name: tensor for name, tensor in weights.items() if name != lost})
    findings = {finding.code: finding.key for finding in diagnose_checkpoint(folder, base=base).findings}
    assert findings["tensors-missing"] == lost.replace("vision_model.", "")
    assert "tensors-extra" not in findings


@pytest.mark.parametrize(
    ("family", "tied", "head"),
    [
        ("Qwen3VLMoe", False, True),  # saved with false at the top, and true for the text model
        ("Qwen3_5", True, False),  # saved with true at the top, and false for the text model
        ("Mistral3", True, False),  # the same
        ("Mistral3", True, True),  # by its config's default tied, and published with a head of its own
    ],
)
def test_ties_are_those_of_the_live_model(family: str, tied: bool, head: bool, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", tie_word_embeddings=tied)
    if tied and head:
        change_weights(base, lambda w: {**w, "language_model.lm_head.weight": torch.ones(w[INPUTS].shape)})
    live = is_tied(load_model(base)[0])
    assert live is (tied and not head)
    assert open_base(open_checkpoint(base)).is_tied is live
    result = exported(base, tmp_path / "export", "full", [])
    assert any("lm_head" in name for name in load_file(result.path / WEIGHTS)) is head
    diagnosis = diagnose_checkpoint(result.path, base=base, deep=True)
    assert [finding.code for finding in diagnosis.findings if finding.severity.value != "note"] == []


def test_experts_that_are_published_the_other_way_round_are_exported_so(tmp_path: Path) -> None:
    """Saved by transformers 5, a Qwen3-VL-MoE has other shapes than its base: every full fine-tune was refused."""
    base = publish(build_family("qwen3_vl_moe", tmp_path / "base"))
    model, processor = train(base, "full")
    model.save_pretrained(tmp_path / "saved")
    result = export_model(model, tmp_path / "export", processing_class=processor)
    assert result.verification.passed
    saved, exported, stored = (
        {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
        for folder in (tmp_path / "saved", result.path, base)
    )
    assert exported == stored
    assert {name for name in stored if saved[name] != stored[name]} == {name for name in stored if ".experts." in name}


INPUTS = "language_model.model.embed_tokens.weight"


def test_a_head_of_its_own_may_be_trained_where_only_the_text_config_speaks_of_a_tie(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = build("Qwen3VLMoe", tmp_path / "base")
    model, processor, _ = load_model(base)
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["lm_head"])
    result = export_model(get_peft_model(model, config), tmp_path / "export", processing_class=processor)
    assert result.verification.passed
