"""Tiny bases of many model families, built from the config classes of the installed transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from scripts.models.tiny_bases import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Wide enough apart that greedy decoding has no ties.
    "initializer_range": 0.3,
}
_EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

TEXT: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mixtral": {**_EXPERTS, "intermediate_size": 24},
    "qwen3_moe": {**_EXPERTS, "mlp_only_layers": [0]},
}
"""Options of each text family's config beside the small sizes."""


def build_text(family: str, folder: Path, *, dtype: str = "float32", **options: Any) -> Path:
    """Build a text base with a byte tokenizer, saved by the installed transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(
        family, **{**_SMALL, "vocab_size": len(tokenizer), **ends, **TEXT[family], **options}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
