"""The differences between model families, as rows of data. A new family is a row and a test.

A checkpoint is published under names of its own: Qwen2.5-VL as `model.layers.*` and `visual.*`. Since transformers
4.52 the live model says `model.language_model.layers.*` and `model.visual.*`, servers say
`language_model.model.layers.*`. A row leads every spelling to the live one, and the live one to the published one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


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

# How a stacked parameter of transformers 5 is published: a tensor per expert and part, the parts one above the other.
# Source: the WeightConverters of qwen2_moe and mixtral in transformers' conversion_mapping.py.
EXPERT_PARTS: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def family_of(model_type: str | None) -> Family:
    """Return the row of a `model_type`; for an unknown one a row whose published names are the live ones."""
    return _BY_TYPE.get(model_type or "", _OTHERS)
