"""One tensor, many spellings: where an adapter's names find a base's tensors.

Qwen2.5-VL is published as `model.layers.*` and `visual.*`; since transformers 4.52 the live model says
`model.language_model.layers.*` and `model.visual.*`, servers say `language_model.model.layers.*`, and an adapter
carries the spelling of the library that trained it. A family is a row of renames that lead every spelling to one, the
live model's. Pure functions over strings, standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

# What wrappers put in front of, or in the middle of, a name: PEFT, torch.compile, FSDP, activation checkpointing.
_WRAPPERS: Final = re.compile(
    r"^base_model\.model\.|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Model types whose tensors are spelled alike.

    Attributes:
        model_types: `model_type` of their `config.json`.
        renames: pattern and replacement, each applied to the outcome of the one before; the last spelling is the live
            model's since transformers 4.52. A name that is spelled so already stays as it is.
        source: where the spellings are written down.
    """

    model_types: frozenset[str]
    renames: tuple[tuple[str, str], ...]
    source: str


_CONVERSIONS: Final = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/conversion_mapping.py"

FAMILIES: Final = (
    Family(
        model_types=frozenset({"qwen2_vl", "qwen2_5_vl"}),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.(?:model\.)?", "model.language_model."),
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
        ),
        source="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/qwen2_5_vl/"
        "modeling_qwen2_5_vl.py (_checkpoint_conversion_mapping); `language_model.model` is vLLM's: https://github.com/"
        "vllm-project/vllm/blob/002d181a55a0/vllm/model_executor/models/qwen2_5_vl.py (hf_to_vllm_mapper)",
    ),
    Family(
        model_types=frozenset(
            {
                "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video",
                "llava_onevision", "mistral3", "paligemma", "vipllava",
            }
        ),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
            (r"^(?:model\.)?(vision_tower|multi_modal_projector)\.(?:vision_model\.)?", r"model.\1."),
            (r"^image_newline$", "model.image_newline"),
        ),
        source=f"{_CONVERSIONS} "
        "(llava, llava_next, CLIPVisionModel)",
    ),
    Family(
        model_types=frozenset({"mllama"}),
        renames=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(?:model\.)?language_model\.(?:model\.)?", "model.language_model."),
            (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
        ),
        source=f"{_CONVERSIONS} (mllama)",
    ),
    Family(
        model_types=frozenset({"mixtral", "minimax", "minimax_m2"}),
        renames=(
            (r"^(layers|embed_tokens|norm)\.", r"model.\1."),
            (r"\.block_sparse_moe\.", ".mlp."),
        ),
        source=f"{_CONVERSIONS} (mixtral)",
    ),
)  # fmt: skip

# Every other model type: published as the live model spells it, but for a body that was trained without its head.
_OTHERS: Final = Family(
    model_types=frozenset(),
    renames=((r"^(layers|embed_tokens|norm)\.", r"model.\1."),),
    source="https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/modeling_llama.py",
)

# How a stacked parameter of transformers 5 is published: a tensor per expert and part, the parts one above the other.
# Source: the WeightConverters of qwen2_moe and mixtral in transformers' conversion_mapping.py.
EXPERT_PARTS: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}

INPUT_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
OUTPUT_EMBEDDINGS: Final = frozenset({"lm_head", "embed_out"})


def family_of(model_type: str | None) -> Family:
    """The family of a `model_type`; one without renames for those that are published as they live."""
    return next((family for family in FAMILIES if model_type in family.model_types), _OTHERS)


def live_name(name: str, family: Family) -> str:
    """A tensor's or module's name as the live model spells it, wrappers taken off."""
    name = _WRAPPERS.sub("", name)
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name


def names_by_live(stored: Iterable[str], family: Family) -> dict[str, str]:
    """Stored names by the live model's spelling of them.

    Raises:
        CheckpointError: two stored tensors are one and the same to the live model.
    """
    found: dict[str, str] = {}
    for name in stored:
        live = live_name(name, family)
        if live in found:
            raise CheckpointError(f"{found[live]} and {name} are two spellings of one tensor; the folder has both")
        found[live] = name
    return found


def is_embedding(name: str, ends: frozenset[str]) -> bool:
    """Whether a tensor is the weight of one of the modules `ends`."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in ends
