"""Bases as their makers publish them, made of those that the library of the day has saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

WEIGHTS = "model.safetensors"
TEXT_SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build_text_base(family: str, folder: Path, **options: Any) -> Path:
    """Build a text model from its config class, with a tokenizer of bytes; skip where transformers has none."""
    import transformers

    from scripts.models.tiny_bases import byte_tokenizer

    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    tokenizer = byte_tokenizer()
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family}Config")(**{**TEXT_SIZES, **tokens, "initializer_range": 0.3, **options})
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
    """Replace a folder's tensors by what `change` makes of them."""
    changed = {name: tensor.clone().contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def change_json(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Let `change` edit a JSON file of a folder."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content, indent=2))
    return folder


def with_second_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with the tied head stored as well, as Qwen3-1.7B is published."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def with_extras(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with tensors that no class holds: a layer too many, MTP heads, old frequencies."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = {name.replace("layers.1.", "layers.2."): t + 0.5 for name, t in weights.items() if "layers.1." in name}
    heads = {
        "mtp.fc.weight": noise(32, 64),
        "mtp.layers.0.self_attn.q_proj.weight": noise(32, 32),
        "mtp.norm.weight": noise(32),
    }
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": noise(8) for layer in range(2)}
    return {**weights, **layers, **heads, **frequencies}
