"""What differs between model families, as rows of data. A new family is a row and a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is published.

    Attributes:
        is_flat: the published config has the text model's keys at the top; 4.x before 4.52 reads nothing else.
        is_tied: what `tie_word_embeddings` is where no level of the config says it.
        names: prefixes of live tensor names and the published ones, first match counts.
    """

    is_flat: bool = False
    is_tied: bool = False
    names: tuple[tuple[str, str], ...] = ()


_QWEN_VL_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))
# A CLIP or SigLIP tower is published with its `vision_model` inside. transformers 5 has none, and puts it back only
# for a model that it loaded with it; of any other 4.x then starts the tower from random weights, with a warning.
_TOWER_NAMES = tuple(
    (f"{outer}vision_tower.{part}", f"vision_tower.vision_model.{part}")
    for outer in ("model.", "")
    for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
)
# transformers publishes LLaVA-like models with the text model inside `language_model`, and loads them as below
# (`_checkpoint_conversion_mapping` of LlavaForConditionalGeneration, 4.52 to 4.57).
_LLAVA_NAMES = (
    *_TOWER_NAMES,
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
)
_PLAIN_TOWER_NAMES = _LLAVA_NAMES[len(_TOWER_NAMES) :]

FAMILIES: Final[dict[str, Family]] = {
    "qwen2_vl": Family(is_flat=True, names=_QWEN_VL_NAMES),
    "qwen2_5_vl": Family(is_flat=True, names=_QWEN_VL_NAMES),
    "qwen3_vl": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "llama": Family(),
    "mistral": Family(),
    "llava": Family(names=_LLAVA_NAMES),
    "llava_next": Family(names=_LLAVA_NAMES),
    "llava_onevision": Family(names=_LLAVA_NAMES),
    "mistral3": Family(names=_PLAIN_TOWER_NAMES),
    "paligemma": Family(is_tied=True, names=_LLAVA_NAMES),
    "gemma": Family(is_tied=True),
    "gemma2": Family(is_tied=True),
    "gemma3": Family(is_tied=True, names=_LLAVA_NAMES),
    "gemma3_text": Family(is_tied=True),
    "phi3": Family(),
    "idefics3": Family(),
    "smolvlm": Family(),
    "internvl": Family(names=_PLAIN_TOWER_NAMES),
    "mllama": Family(),
    "mixtral": Family(),
    "gpt2": Family(is_tied=True),
}
"""Families that transformers 4.x knows too: only for these is a folder that 4.x cannot load a fault."""
