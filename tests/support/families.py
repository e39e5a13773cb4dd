"""Tiny bases of many model families, built from the config classes of the installed transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from scripts.models.tiny_bases import LLAVA_TEMPLATE, byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SMALL: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Wide enough apart that greedy decoding has no ties.
    "initializer_range": 0.3,
}
EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_SIGLIP: Final[dict[str, Any]] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.3,
}
_CLIP: Final = {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}

_QWEN_VISION: Final[dict[str, Any]] = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
    "patch_size": 14, "mlp_ratio": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1], "initializer_range": 0.3,
}  # fmt: skip
_MROPE: Final[dict[str, Any]] = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0,
    }
}  # fmt: skip
_HYBRID: Final[dict[str, Any]] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_LATENT: Final[dict[str, Any]] = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip

TEXT: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "granite": {},
    "cohere": {},
    "cohere2": {},
    "glm": {},
    "glm4": {},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "ministral": {},
    "exaone4": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "gpt_neox": {"num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "nemotron": {},
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "seed_oss": {},
    "mixtral": {**EXPERTS, "intermediate_size": 24},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "olmoe": {**EXPERTS, "intermediate_size": 24},
    "phimoe": {**EXPERTS, "intermediate_size": 24},
    "granitemoe": {**EXPERTS, "intermediate_size": 24},
    "glm4_moe": {**EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "deepseek_v2": {**EXPERTS, **_LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**EXPERTS, **_LATENT},
    "gpt_oss": {**EXPERTS},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {**EXPERTS, **_HYBRID, "shared_expert_intermediate_size": 24},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "granitemoehybrid": {
        **EXPERTS,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 24,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
}
"""Options of each text family's config beside the small sizes."""

VISION: Final[dict[str, dict[str, Any]]] = {
    "gemma3": {"text": "gemma3_text", "vision": _SIGLIP, "mm_tokens_per_image": 4},
    "paligemma": {"text": "gemma", "vision": {**_SIGLIP, "projection_dim": 32}, "projection_dim": 32},
    "llava": {"text": "llama", "vision": _CLIP},
    "llava_next": {"text": "mistral", "vision": _CLIP},
    "llava_onevision": {"text": "qwen2", "vision": _SIGLIP},
    "vipllava": {"text": "llama", "vision": _CLIP, "vision_feature_layers": [-1, -1, -1, -1, -1]},
    "aya_vision": {"text": "cohere2", "vision": _SIGLIP},
    "mistral3": {"text": "mistral", "vision": {**_SIGLIP, "model_type": "pixtral", "head_dim": 16}},
    "idefics3": {"text": "llama", "vision": {**_SIGLIP, "model_type": "idefics3_vision"}},
    "smolvlm": {"text": "llama", "vision": {**_SIGLIP, "model_type": "smolvlm_vision"}},
    "internvl": {
        "text": "qwen2",
        "vision": {
            **_SIGLIP,
            "model_type": "internvl_vision",
            "image_size": [28, 28],
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
        },
    },
    "qwen2_vl": {"text": "qwen2_vl_text", "vision": _QWEN_VISION, "text_options": _MROPE},
    "qwen2_5_vl": {"text": "qwen2_5_vl_text", "vision": _QWEN_VISION, "text_options": _MROPE},
    "qwen3_vl": {"text": "qwen3_vl_text", "vision": _QWEN_VISION, "text_options": _MROPE},
    "qwen3_vl_moe": {
        "text": "qwen3_vl_moe_text",
        "vision": _QWEN_VISION,
        "text_options": {**_MROPE, **EXPERTS},
    },
    "qwen3_5": {"text": "qwen3_5_text", "vision": _QWEN_VISION, "text_options": {**_MROPE, **_HYBRID}},
    "qwen3_5_moe": {
        "text": "qwen3_5_moe_text",
        "vision": _QWEN_VISION,
        "text_options": {**_MROPE, **_HYBRID, **EXPERTS, "shared_expert_intermediate_size": 24},
    },
    "glm4v": {"text": "glm4v_text", "vision": _QWEN_VISION, "text_options": _MROPE},
    "mllama": {
        "text": "mllama_text_model",
        "vision": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
            "intermediate_layers_indices": [1], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        "text_options": {"cross_attention_layers": [1]},
    },
}  # fmt: skip
"""The same of VLMs: their text model's type, their vision config, and what the whole config has beside them."""


# Attributes that processors look for on their tokenizer.
_PLACES: Final = {
    "image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>",
    "vision_start_token": "<boi>", "vision_end_token": "<eoi>", "start_image_token": "<boi>",
    "end_image_token": "<eoi>", "context_image_token": "<image>", "audio_token": "<audio>", "boa_token": "<boa>",
    "eoa_token": "<eoa>",
}  # fmt: skip


def _tokenizer(folder: Path) -> Any:
    """Save a byte tokenizer that knows what VLMs mark pictures with, and return it as it loads."""
    from transformers import AutoTokenizer

    byte_tokenizer(extra=sorted(set(_PLACES.values()))).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": _PLACES}))
    return AutoTokenizer.from_pretrained(folder)


def _processor(family: str, tokenizer: Any) -> Any:
    """Return a family's own processor with its own image processor, as it comes; it is asked for text alone."""
    import inspect

    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    processor_class: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(_SEES_AS.get(family, family))
    videos = VIDEO_PROCESSOR_MAPPING_NAMES.get(_SEES_AS.get(family, family))
    known: dict[str, Any] = {
        "image_processor": getattr(transformers, images["torchvision"])(),
        "video_processor": getattr(transformers, videos["torchvision"] if isinstance(videos, dict) else videos)()
        if videos
        else None,
        "tokenizer": tokenizer,
        "chat_template": LLAVA_TEMPLATE,
        "patch_size": 14,
    }
    wanted = inspect.signature(processor_class.__init__).parameters
    return processor_class(**{name: value for name, value in known.items() if name in wanted and value is not None})


_SEES_AS: Final = {"qwen3_vl_moe": "qwen3_vl", "vipllava": "llava"}  # where the library has no row


def build_family(family: str, folder: Path, *, dtype: str = "float32", **options: Any) -> Path:
    """Build a base with a byte tokenizer, saved by the installed transformers.

    Args:
        family: a key of `TEXT` or `VISION`.
        folder: where to.
        dtype: of its weights.
        options: further options of its (text) config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    folder.mkdir(parents=True)
    tokenizer = _tokenizer(folder)
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    # The family's own tokenizer class may add a token as it loads (Qwen2's adds <|endoftext|>): it has a row, too.
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    rows = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    sizes = {**SMALL, "vocab_size": rows, **ends}
    if family == "falcon":  # computes it
        del sizes["head_dim"]
    if family in VISION:
        whole = dict(VISION[family])
        text, vision = whole.pop("text"), whole.pop("vision")
        inner = {**sizes, **TEXT.get(text, {}), **whole.pop("text_options", {}), **options}
        image = tokenizer.convert_tokens_to_ids("<image>")
        config = AutoConfig.for_model(
            family,
            text_config=AutoConfig.for_model(text, **inner).to_dict(),
            vision_config=vision,
            **{"image_token_id": image, "image_token_index": image, **whole},
        )
        # The class's defaults may say it otherwise at the two levels, of which each reader takes its own.
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        auto: Any = AutoModelForImageTextToText
    else:
        config, auto = AutoConfig.for_model(family, **{**sizes, **TEXT[family], **options}), AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).to(getattr(torch, dtype))
    for end, value in ends.items():
        setattr(model.generation_config, end, value)
    model.save_pretrained(folder)
    if family in VISION:
        _processor(family, tokenizer).save_pretrained(folder)
    return folder
