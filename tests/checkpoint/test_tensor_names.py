"""Spellings of tensor names, held against what the installed transformers really loads and saves."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.model_families import FAMILIES, family_of
from grpo_toolkit.checkpoint.tensor_names import live_name, names_by_live, plan_renames
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.merge.merge import merge_adapter
from grpo_toolkit.model.load import auto_class
from tests.support.models import MERGE_BUILDERS
from tests.support.training import v5_only

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


# What a server renames on loading, the first prefix that fits, and what its model then has: names that come out as
# none of these stop it. Source: vLLM's hf_to_vllm_mapper, and the modules that it maps to,
# https://github.com/vllm-project/vllm/blob/002d181a55a03803d7d69547846630069d2378b8/vllm/model_executor/models/qwen2_5_vl.py
SERVED_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
SERVED = re.compile(
    r"language_model\.(?:lm_head\.weight|model\.(?:embed_tokens\.weight|norm\.weight|layers\.\d+\."
    r"(?:self_attn\.(?:[qkv]_proj\.(?:weight|bias)|o_proj\.weight)|mlp\.(?:gate|up|down)_proj\.weight"
    r"|(?:input|post_attention)_layernorm\.weight)))"
    r"|visual\.(?:patch_embed\.proj\.weight|blocks\.\d+\.(?:attn\.(?:qkv|proj)\.(?:weight|bias)"
    r"|mlp\.(?:gate|up|down)_proj\.(?:weight|bias)|norm[12]\.weight)"
    r"|merger\.(?:ln_q\.weight|mlp\.[02]\.(?:weight|bias)))"
)


def names_not_served(names: Iterable[str]) -> list[str]:
    """Tensor names of a Qwen2.5-VL that vLLM's loader would find no place for."""
    strange = []
    for name in names:
        served = next((new + name.removeprefix(old) for old, new in SERVED_PREFIXES if name.startswith(old)), name)
        if not SERVED.fullmatch(served):
            strange.append(name)
    return strange


@pytest.mark.parametrize(
    "builder", [pytest.param(name, marks=v5_only) if "moe" in name else name for name in sorted(MERGE_BUILDERS)]
)
def test_what_is_saved_and_what_lives_come_to_the_same_names(builder: str, tmp_path: Path) -> None:
    base = MERGE_BUILDERS[builder](tmp_path / builder)
    family = family_of(json.loads((base / "config.json").read_text())["model_type"])
    with safe_open(base / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    live = set(auto_class(base).from_pretrained(base).state_dict())
    spelled = {live_name(name, family) for name in live}
    # Experts live stacked in transformers 5 and are stored one by one; a tied head is stored once.
    assert {n for n in (live_name(n, family) for n in stored) if ".experts." not in n} <= spelled
    assert {name for name in spelled if ".experts." not in name} - {live_name(name, family) for name in stored} <= {
        "lm_head.weight"
    }


@pytest.mark.parametrize(
    ("model_type", "name", "live"),
    [
        ("qwen2_5_vl", "model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("qwen2_5_vl", "language_model.model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("qwen2_5_vl", "model.language_model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("qwen2_5_vl", "base_model.model.visual.blocks.1.attn.qkv", "model.visual.blocks.1.attn.qkv"),
        ("qwen2_5_vl", "language_model.lm_head.weight", "lm_head.weight"),
        ("qwen2_5_vl", "_orig_mod.model.norm.weight", "model.language_model.norm.weight"),
        ("qwen2_5_vl", "module.visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias"),
        ("llama", "_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.mlp.x", "model.layers.0.mlp.x"),
        ("llama", "base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("llama", "model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "model.layers.0.mlp.up_proj.base_layer", "model.layers.0.mlp.up_proj"),
        # PEFT wraps a stack of experts once for each of its matrices: the names of their factors differ by this alone.
        (
            "qwen3_moe",
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.default.weight",
            "model.layers.0.mlp.experts.base_layer.lora_A.default.weight",
        ),
        (
            "qwen3_moe",
            "base_model.model.model.layers.0.mlp.experts.lora_A.default.weight",
            "model.layers.0.mlp.experts.lora_A.default.weight",
        ),
        ("llava", "language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("llava", "vision_tower.vision_model.encoder.layers.0.fc1", "model.vision_tower.encoder.layers.0.fc1"),
        ("gemma3", "model.multi_modal_projector.weight", "model.multi_modal_projector.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("llama", "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("qwen3_vl", "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    ],
)
def test_spellings(model_type: str, name: str, live: str) -> None:
    assert live_name(name, family_of(model_type)) == live
    assert live_name(live, family_of(model_type)) == live


def build_small_vlm(model_type: str) -> Any:
    """A model of random weights, as small as its config class allows."""
    import transformers
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {**sizes, **tokens, "num_key_value_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    text_types = {"aya_vision": "cohere2", "got_ocr2": "qwen2"}
    if model_type == "got_ocr2":
        vision |= {"mlp_dim": 16, "output_channels": 16, "global_attn_indexes": [0], "window_size": 2}
    if model_type == "mllama":
        text |= {"cross_attention_layers": [0], "rope_scaling": {"rope_type": "default"}}
        vision |= {
            "attention_heads": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        }
    else:
        text["model_type"] = text_types.get(model_type, "llama")
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    config.image_token_index = config.image_token_id = 63
    return getattr(transformers, type(config).__name__.replace("Config", "ForConditionalGeneration"))(config)


@pytest.mark.parametrize("model_type", ["aya_vision", "got_ocr2", "llava_next_video", "mllama", "vipllava"])
def test_the_published_names_of_a_live_model_load_whole_and_lead_back_to_it(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build_small_vlm(model_type)
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    live = model.state_dict()
    renames = plan_renames(live, None, model_type)
    published = {renames.get(name, name): tensor.clone() for name, tensor in live.items()}
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]] == []
    assert {live_name(name, family_of(model_type)) for name in published} >= {
        live_name(name, family_of(model_type)) for name in live
    }
    assert all(name.startswith(("language_model.", "vision_", "multi_modal_", "image_newline")) for name in published)


def test_every_family_says_where_its_names_are_written_down() -> None:
    assert all(family.source.startswith("https://") for family in FAMILIES)
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"visual.x and model.visual.x are two spellings of one tensor"):
        names_by_live(["visual.x", "model.visual.x"], family_of("qwen2_5_vl"))


def test_exports_and_merges_have_names_that_vllm_serves(qwen: Path, tmp_path: Path) -> None:
    from tests.merge.test_merge import make_adapter

    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "merged")
    export_model(qwen, tmp_path / "export", verify=False)
    for folder in (qwen, tmp_path / "merged", tmp_path / "export"):
        names = open_checkpoint(folder).tensors()
        assert len(names) > 50
        assert names_not_served(names) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.model.layers.0.mlp.up_proj.weight",  # DeepSpeed ZeRO-3 under transformers 5
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.base_layer.weight",
        "_fsdp_wrapped_module.visual.blocks.0.norm1.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "visual.blocks.0.attn.q.lora_B.weight",
    ],
)
def test_names_that_vllm_would_stop_at(name: str) -> None:
    assert names_not_served([name, "model.norm.weight", "lm_head.weight"]) == [name]
