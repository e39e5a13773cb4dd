"""Tiny bases of many model families, built from the config classes of the installed transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from scripts.models.family_processors import GRID, PICTURES, build_processor, save_tokenizer
from scripts.models.published_forms import BORN_IN_V5, publish

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}
_WHOLE_MROPE: Final[dict[str, Any]] = {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
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
    "llava_next": {"text": "mistral", "vision": _CLIP, "image_grid_pinpoints": GRID},
    "llava_onevision": {
        "text": "qwen2", "vision": _SIGLIP, "image_grid_pinpoints": GRID, "vision_feature_select_strategy": "full",
    },
    "vipllava": {"text": "llama", "vision": _CLIP, "vision_feature_layers": [-1, -1, -1, -1, -1]},
    "aya_vision": {"text": "cohere2", "vision": _SIGLIP, "downsample_factor": 2},
    "mistral3": {
        "text": "mistral", "vision": {**_SIGLIP, "model_type": "pixtral", "head_dim": 16}, "spatial_merge_size": 1,
    },
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
    "qwen3_5": {"text": "qwen3_5_text", "vision": _QWEN_VISION, "text_options": {**_WHOLE_MROPE, **_HYBRID}},
    "qwen3_5_moe": {
        "text": "qwen3_5_moe_text",
        "vision": _QWEN_VISION,
        "text_options": {**_WHOLE_MROPE, **_HYBRID, **EXPERTS, "shared_expert_intermediate_size": 24},
    },
    "glm4v": {"text": "glm4v_text", "vision": _QWEN_VISION, "text_options": _WHOLE_MROPE},
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


NOTES: Final[dict[str, str]] = {
    "ministral": "published as transformers 5 saves it",
    "paligemma": "transformers 5.24 masks a text without `token_type_ids` in both directions where nothing is padded, "
    "and TRL 1.16 gives completions the prefix's type: log-probabilities see what follows",
    "mllama": "on text alone: TRL 1.16 gives its forward no `aspect_ratio_ids`",
    "qwen3_vl_moe": "transformers 5.24 saves the experts of a published base transposed, and a trainer resumes from "
    "such ones; exports have its shapes, and `repair --rewrite-weights` turns a checkpoint's back",
}
"""Remarks on a family in the manual's table, beside its outcome."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell of the matrix.

    Attributes:
        family: a key of `TEXT` or `VISION`.
        form: of its base: "v5" as transformers 5 saves it, "published" as makers published it.
        data: that it is trained on, "text" or "pictures".
        kind: "full" or "lora".
    """

    family: str
    form: str
    data: str
    kind: str

    def __str__(self) -> str:
        return "-".join((self.family, self.form, self.data, self.kind))


TEXT_ALONE: Final = frozenset({"mllama"})
"""VLMs that TRL trains on text alone."""


def _cases(family: str) -> Iterator[Case]:
    data = "pictures" if family in PICTURES and family not in TEXT_ALONE else "text"
    forms = [("v5", "text")]
    if family not in BORN_IN_V5 or data == "pictures":
        forms.append(("v5" if family in BORN_IN_V5 else "published", data))
    for form, rows in forms:
        for kind in ("full", "lora"):
            yield Case(family=family, form=form, data=rows, kind=kind)


CASES: Final = tuple(case for family in (*TEXT, *VISION) for case in _cases(family))


def build_case(case: Case, folder: Path) -> Path:
    """Build the base of a case."""
    base = build_family(case.family, folder)
    return publish(base) if case.form == "published" else base


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
    tokenizer = save_tokenizer(folder)
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    if family in VISION:
        build_processor(family, tokenizer).save_pretrained(folder)
    # The family's own tokenizer class or processor may add a token (Qwen2's adds <|endoftext|>): it has a row, too.
    rows = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    sizes = {**SMALL, "vocab_size": rows, **ends}
    if family in ("falcon", "qwen2_vl", "qwen2_5_vl"):  # which compute it
        del sizes["head_dim"]
    if family in VISION:
        whole = dict(VISION[family])
        text, vision = whole.pop("text"), whole.pop("vision")
        inner = {**sizes, **TEXT.get(text, {}), **whole.pop("text_options", {}), **options}
        image, begin, end, video = tokenizer.convert_tokens_to_ids(["<image>", "<boi>", "<eoi>", "<video>"])
        places = {
            "image_token_id": image, "image_token_index": image, "vision_start_token_id": begin,
            "vision_end_token_id": end, "image_start_token_id": begin, "image_end_token_id": end,
            "boi_token_index": begin, "eoi_token_index": end, "video_token_id": video,
        }  # fmt: skip
        config = AutoConfig.for_model(
            family,
            text_config=AutoConfig.for_model(text, **inner).to_dict(),
            vision_config=vision,
            **{**places, **whole},
        )
        # The class's defaults may say it otherwise at the two levels, of which each reader takes its own.
        if hasattr(config, "tie_word_embeddings") and hasattr(config.text_config, "tie_word_embeddings"):
            config.text_config.tie_word_embeddings = config.tie_word_embeddings
        auto: Any = AutoModelForImageTextToText
    else:
        config, auto = AutoConfig.for_model(family, **{**sizes, **TEXT[family], **options}), AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).to(getattr(torch, dtype))
    for end, value in ends.items():
        setattr(model.generation_config, end, value)
    model.save_pretrained(folder)
    return folder
