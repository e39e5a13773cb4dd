"""The tiny models that tests run through, by name: the bases of scripts/models, and the other families of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.models.tiny_bases import build_llama, build_llava, build_qwen2_5_vl, build_qwen3_moe

if TYPE_CHECKING:
    from pathlib import Path


def build_gpt2(folder: Path) -> Path:
    """Build a GPT-2: matrices stored as (in, out), biases everywhere, embeddings tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _save_random(
        GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64), folder
    )


def build_mixtral(folder: Path) -> Path:
    """Build a Mixtral: stacked experts with other names, `block_sparse_moe`, w1, w2, w3."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return _save_random(MixtralForCausalLM, config, folder)


def _save_random(model_class: Any, config: Any, folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


BUILDERS = {"qwen2_5_vl": build_qwen2_5_vl, "llava": build_llava, "llama": build_llama}
MERGE_BUILDERS = {**BUILDERS, "gpt2": build_gpt2, "qwen3_moe": build_qwen3_moe, "mixtral": build_mixtral}
