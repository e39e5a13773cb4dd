"""Merges, held against PEFT's own on real adapters; what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint import open_checkpoint
from grpo_toolkit.errors import (
    CheckpointError,
    GrpoToolkitError,
    InputError,
    OutputExistsError,
    UnsupportedError,
    VerificationError,
)
from grpo_toolkit.inference import auto_class, dtype_argument, load_model
from grpo_toolkit.merge import merge_adapter
from models import MERGE_BUILDERS
from training import v5_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LANGUAGE = r".*layers.*\.(q_proj|down_proj)"

# What PEFT can do to a model, by name: the base, and the options of its adapter.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen", {"target_modules": SEVEN}),
    "rslora": ("qwen", {"target_modules": LANGUAGE, "use_rslora": True, "lora_alpha": 3}),
    "dora": ("qwen", {"target_modules": SEVEN, "use_dora": True}),
    "patterns": (
        "qwen",
        {
            "target_modules": SEVEN,
            "rank_pattern": {"q_proj": 2, r"language_model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 32, "down_proj": 1},
        },
    ),
    "layers": ("qwen", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "gaussian": ("qwen", {"target_modules": LANGUAGE, "init_lora_weights": "gaussian"}),
    "convolution": ("qwen", {"target_modules": r".*patch_embed\.proj"}),
    "dora on a convolution": ("qwen", {"target_modules": r".*patch_embed\.proj", "use_dora": True}),
    "modules to save": ("qwen", {"target_modules": LANGUAGE, "modules_to_save": ["mlp.2"]}),
    "biases": ("qwen", {"target_modules": SEVEN, "bias": "all"}),
    "biases of adapted layers": ("qwen", {"target_modules": ["q_proj", "qkv"], "bias": "lora_only"}),
    "lora_bias": ("qwen", {"target_modules": ["q_proj", "qkv"], "lora_bias": True}),
    "untied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "untied head to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora on embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora on conv1d": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "conv1d, square": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "llava": ("llava", {"target_modules": [*SEVEN, "out_proj", "fc1", "linear_2"]}),
}
EXPERTS = {
    "experts": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "one parameter of the experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
    "experts of mixtral": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    ),
}


@pytest.fixture(scope="module")
def bases(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny bases by family, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {"qwen": qwen}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = MERGE_BUILDERS[name](folder / name)
        return made[name]

    return base


def load_float32(base: Path) -> Any:
    return auto_class(base).from_pretrained(base, **{dtype_argument(): torch.float32})


def in_dtype(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a base with its weights in another dtype."""
    shutil.copytree(base, folder)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_adapter(base: Path, folder: Path, name: str = "default", **options: Any) -> Path:
    """A PEFT adapter of a base, every tensor of it moved off its start, as training would."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "init_lora_weights": False, **options}
    torch.manual_seed(3)
    model = get_peft_model(load_float32(base), LoraConfig(**options), adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder if name == "default" else folder / name


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The oracle: the whole model in float32, merged and saved by PEFT and transformers."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_float32(base), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return stored(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in open_checkpoint(folder).weight_files() for n, t in load_file(file).items()}


def assert_one_rounding_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.dtype == torch.float32:  # two orders of summation
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n} {text}")
            continue
        expected = theirs[name].to(tensor.dtype)
        apart = (tensor.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        tiny = (tensor.float() - expected.float()).abs() < 1e-6  # around zero, where signs differ
        assert ((apart <= 1) | tiny).all(), name


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=v5_only) for name in EXPERTS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_merge_is_pefts_merge(
    variant: str, dtype: torch.dtype, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    family, options = {**VARIANTS, **EXPERTS}[variant]
    base = bases(family)
    if dtype is not torch.float32:
        base = in_dtype(base, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    result = merge_adapter(adapter, tmp_path / "merged", base=base)
    ours = stored(tmp_path / "merged")
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert_one_rounding_apart(ours, merged_by_peft(base, adapter, tmp_path / "peft"))
    before = stored(base)
    assert {name for name in ours if not ours[name].equal(before[name])} == set(result.changed)
    assert result.unchanged == ()
    assert result.copied == len(before) - len(result.changed)
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "merged").iterdir()}
