"""The differences between model families, as rows of data. A new family is a row and a test.

A checkpoint is published under names of its own: Qwen2.5-VL as `model.layers.*` and `visual.*`. Since transformers
4.52 the live model says `model.language_model.layers.*` and `model.visual.*`, servers say
`language_model.model.layers.*`. A row leads every spelling to the live one, and the live one to the published one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from grpo_toolkit.checkpoint.json_files import JsonObject


@dataclass(frozen=True, kw_only=True)
class Family:
    """The model types that are published alike.

    Attributes:
        model_types: `model_type` of their `config.json`.
        live: pattern and replacement, each applied to the outcome of the one before; the last spelling is the live
            model's since transformers 4.52. A name that is spelled so already stays as it is.
        published: prefixes of live names and the published ones; the first match counts.
        is_flat: the published config has the text model's keys at the top; 4.x before 4.52 reads nothing else.
        is_tied: what `tie_word_embeddings` is where no level of the config says it.
        extra_embeddings: rows of the input embeddings beyond `vocab_size`, by the model's design.
        is_in_v4: transformers 4.x knows it too, so that a folder that 4.x cannot load is a fault.
        source: where the spellings are written down.
    """

    model_types: frozenset[str]
    live: tuple[tuple[str, str], ...]
    published: tuple[tuple[str, str], ...] = ()
    is_flat: bool = False
    is_tied: bool = False
    extra_embeddings: int = 0
    is_in_v4: bool = True
    source: str


_CONVERSIONS: Final = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/conversion_mapping.py"
_LLAMA: Final = (
    "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/modeling_llama.py"
)

# Published as the live model spells it, but for a body that was trained without its head.
_BODY: Final = ((r"^(layers|embed_tokens|norm)\.", r"model.\1."),)
_LLAVA: Final = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
    (r"^(?:model\.)?(vision_tower|multi_modal_projector)\.(?:vision_model\.)?", r"model.\1."),
    (r"^image_newline$", "model.image_newline"),
)
# transformers publishes LLaVA-like models with the text model inside `language_model`, and loads them as below
# (`_checkpoint_conversion_mapping` of LlavaForConditionalGeneration, 4.52 to 4.57).
_LLAVA_PUBLISHED: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
)
# A CLIP or SigLIP tower is published with its `vision_model` inside. transformers 5 has none, and puts it back only
# for a model that it loaded with it; of any other 4.x then starts the tower from random weights, with a warning.
_CLIP_PUBLISHED: Final = (
    *(
        (f"{outer}vision_tower.{part}", f"vision_tower.vision_model.{part}")
        for outer in ("model.", "")
        for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
    ),
    *_LLAVA_PUBLISHED,
)
_MIXTRAL: Final = (*_BODY, (r"\.block_sparse_moe\.", ".mlp."))

FAMILIES: Final = (
    Family(
        model_types=frozenset({"qwen2_vl", "qwen2_5_vl"}),
        live=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.(?:model\.)?", "model.language_model."),
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
        published=(("model.language_model.", "model."), ("model.visual.", "visual.")),
        is_flat=True,
        source="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/qwen2_5_vl/"
        "modeling_qwen2_5_vl.py (_checkpoint_conversion_mapping); `language_model.model` is vLLM's: https://github.com/"
        "vllm-project/vllm/blob/002d181a55a0/vllm/model_executor/models/qwen2_5_vl.py (hf_to_vllm_mapper)",
    ),
    Family(
        model_types=frozenset({"llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"}),
        live=_LLAVA,
        published=_CLIP_PUBLISHED,
        source=f"{_CONVERSIONS} (llava, llava_next, CLIPVisionModel)",
    ),
    Family(
        model_types=frozenset({"aya_vision", "gemma3", "paligemma"}),
        live=_LLAVA,
        published=_CLIP_PUBLISHED,
        is_tied=True,
        source=f"{_CONVERSIONS} (llava, CLIPVisionModel)",
    ),
    Family(
        model_types=frozenset({"got_ocr2", "internvl", "mistral3"}),
        live=_LLAVA,
        published=_LLAVA_PUBLISHED,
        source=f"{_CONVERSIONS} (llava)",
    ),
    Family(
        model_types=frozenset({"mllama"}),
        live=(*_LLAVA[:2], (r"^(vision_model|multi_modal_projector)\.", r"model.\1.")),
        published=_LLAVA_PUBLISHED,
        extra_embeddings=8,
        source=f"{_CONVERSIONS} (mllama); the eight rows: MllamaTextModel in modeling_mllama.py",
    ),
    Family(model_types=frozenset({"mixtral", "minimax"}), live=_MIXTRAL, source=f"{_CONVERSIONS} (mixtral)"),
    Family(
        model_types=frozenset({"minimax_m2"}), live=_MIXTRAL, is_in_v4=False, source=f"{_CONVERSIONS} (minimax_m2)"
    ),
    Family(
        model_types=frozenset({"idefics3", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_vl", "smolvlm"}),
        live=_BODY,
        source=_LLAMA,
    ),
    Family(model_types=frozenset({"gemma", "gemma2", "gemma3_text", "gpt2"}), live=_BODY, is_tied=True, source=_LLAMA),
)
_OTHERS: Final = Family(model_types=frozenset(), live=_BODY, is_in_v4=False, source=_LLAMA)
_BY_TYPE: Final = {model_type: family for family in FAMILIES for model_type in family.model_types}

# The rope_theta that 4.x takes where a config names none, by the model type of the text model. transformers 5 writes
# it into `rope_parameters`, where 4.x does not look.
# Source: the signatures of the config classes in transformers 4.57.6, the last 4.x (tests/doctor/test_rotary.py).
_THETAS: Final = {
    10_000.0: "arcee aria_text chameleon cohere cohere2 deepseek_v2 deepseek_v3 diffllama doge dots1 exaone4 falcon "
    "gemma gemma2 glm glm4 glm4_moe glm4v_text gpt_neox granite granitemoe granitemoehybrid granitemoeshared "
    "hunyuan_v1_dense hunyuan_v1_moe jetmoe llama ministral mistral nemotron olmo olmo2 olmo3 olmoe phi phi3 "
    "phi4_multimodal qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma seed_oss stablelm starcoder2 "
    "vaultgemma zamba2",
    25_000.0: "fuyu persimmon",
    100_000.0: "falcon_h1 helium",
    150_000.0: "gpt_oss",
    500_000.0: "bitnet ernie4_5 ernie4_5_moe flex_olmo llama4_text mllama_text_model",
    1_000_000.0: "gemma3_text gemma3n_text lfm2 minimax mixtral phimoe qwen2_5_omni_text qwen2_5_vl_text "
    "qwen2_vl_text qwen3_omni_moe_text",
    2_000_000.0: "smollm3",
    5_000_000.0: "qwen3_vl_moe_text qwen3_vl_text",
    10_000_000.0: "longcat_flash",
    12_000_000.0: "apertus",
}
THETAS_OF_V4: Final = {model_type: theta for theta, names in _THETAS.items() for model_type in names.split()}
PARTIAL_ROTARY_OF_V4: Final = {
    **dict.fromkeys(["fuyu", "glm", "glm4", "glm4_moe", "nemotron", "persimmon", "phi", "recurrent_gemma"], 0.5),
    **dict.fromkeys(["gpt_neox", "qwen3_next", "stablelm"], 0.25),
}
"""The part of a head's dimensions that 4.x rotates where a config does not say it; of all other types the whole."""
LOCAL_THETA_OF_V4: Final = {"gemma3_text": 10_000.0, "gemma3n_text": 10_000.0}
"""The rope_local_base_freq of 4.x: the theta of layers with a sliding window, where they have another one."""
SCALING_OF_V4: Final = {
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
}
ROTARY_NAMES_OF_V4: Final = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""Keys of rotary settings under other names in 4.x."""

# How a stacked parameter of transformers 5 is published: a tensor per expert and part, the parts one above the other.
# Source: the WeightConverters of qwen2_moe and mixtral in transformers' conversion_mapping.py.
EXPERT_PARTS: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def family_of(model_type: str | None) -> Family:
    """Return the row of a `model_type`; for an unknown one a row whose published names are the live ones."""
    return _BY_TYPE.get(model_type or "", _OTHERS)


def older_rotary(rope: JsonObject, model_type: str) -> JsonObject:
    """Return `rope_parameters` of transformers 5 as 4.x spells them; {} where it has no keys that say the same.

    Args:
        rope: the settings, or one set of them for each type of layers.
        model_type: of the model that computes with them, the text model's.
    """
    if "rope_theta" not in rope:
        whole, local = rope.get("full_attention"), rope.get("sliding_attention")
        if not isinstance(whole, dict) or not isinstance(local, dict):
            return {}
        older, theta = older_rotary(whole, model_type), local.get("rope_theta")
        if model_type in LOCAL_THETA_OF_V4:
            return {**older, "rope_local_base_freq": theta}
        return older if older.get("rope_theta") == theta else {}
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        return {}
    older = {"rope_scaling": _older_scaling(rope, model_type), "rope_theta": theta}
    if part not in (None, PARTIAL_ROTARY_OF_V4.get(model_type, 1.0)):
        older["partial_rotary_factor"] = part
    names = ROTARY_NAMES_OF_V4.get(model_type, {})
    return {names.get(key, key): value for key, value in older.items()}


def is_read_otherwise(rope: JsonObject, model_type: str) -> bool:
    """Return whether 4.x, which looks for other keys, computes with other settings than `rope_parameters` says."""
    if model_type not in THETAS_OF_V4:
        return False
    names = ROTARY_NAMES_OF_V4.get(model_type, {})
    usual = {
        "rope_scaling": SCALING_OF_V4.get(model_type),
        names.get("rope_theta", "rope_theta"): THETAS_OF_V4[model_type],
        "rope_local_base_freq": LOCAL_THETA_OF_V4.get(model_type),
    }
    return any(value != usual.get(key) for key, value in older_rotary(rope, model_type).items())


def _older_scaling(rope: JsonObject, model_type: str) -> JsonObject | None:
    """Return the `rope_scaling` of 4.x that means the same; None where there is nothing but a theta."""
    others = ("rope_theta", "partial_rotary_factor")
    scaling = {key: copy.deepcopy(value) for key, value in rope.items() if key not in others}
    if scaling.get("rope_type", "default") in _WITHOUT_SETTINGS and set(scaling) <= {"rope_type", "type"}:
        return {"rope_type": "default"} if model_type == "mllama_text_model" else None  # which has to have one
    if model_type == "phi3":  # whose config takes these three and no others
        return {"type": rope.get("rope_type")} | {key: rope[key] for key in _PHI3_FACTORS if key in rope}
    scaling.setdefault("rope_type", scaling.get("type", "default"))
    if "mrope_section" in scaling and family_of(model_type.removesuffix("_text")).is_flat:
        scaling["type"] = "mrope"  # read by 4.49, which knows no rope_type "default" with sections
    return scaling


_WITHOUT_SETTINGS: Final = ("default", "mrope", "axial")
_PHI3_FACTORS: Final = ("short_factor", "long_factor")
