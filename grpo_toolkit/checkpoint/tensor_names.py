"""Names of tensors: wrappers taken off, every spelling led to the live model's, live names to the published ones.

The spellings of each family are rows of `model_families.py`. Pure functions over strings, standard library only.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from grpo_toolkit.checkpoint.model_families import Family

# What wrappers put in front of a name or into it: DDP, PEFT, torch.compile, FSDP, activation checkpointing.
_WRAPPERS: Final = re.compile(
    r"^(?:(?:module|base_model\.model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
    r"|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|\.(?:base_layer(?!.*\.lora_)|modules_to_save\.default)(?=\.|$)"
)
# A name that has none of these needs no closer look; almost none has.
_SUSPECT: Final = re.compile(r"_fsdp_|_orig_mod|_checkpoint_wrapped|base_layer|modules_to_save")
_SUSPECT_STARTS: Final = ("module.", "base_model.", "model.model.")
_LORA: Final = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?=\.|$)")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")
_VISION: Final = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower)\.")

INPUT_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in"})
OUTPUT_EMBEDDINGS: Final = frozenset({"lm_head", "embed_out"})


def without_wrappers(name: str) -> str:
    """Return a name as the model itself has it."""
    return _WRAPPERS.sub("", name)


def live_name(name: str, family: Family) -> str:
    """Return a tensor's or module's name as the live model spells it, wrappers taken off."""
    return _live_name(name, family.live)


@lru_cache(maxsize=16_384)  # the checkpoints of a run have the same names
def _live_name(name: str, live: tuple[tuple[str, str], ...]) -> str:
    name = without_wrappers(name)
    for pattern, replacement in live:
        name = re.sub(pattern, replacement, name)
    return name


def names_by_live(stored: Iterable[str], family: Family) -> dict[str, str]:
    """Return stored names by the live model's spelling of them.

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


def published_name(name: str, model_type: str) -> str:
    """Return a live tensor name as its family publishes it; the name itself where it is published already."""
    for live, published in family_of(model_type).published:
        if name.startswith(live):
            return published + name.removeprefix(live)
    return name


def plan_renames(names: Iterable[str], known: frozenset[str] | None, model_type: str) -> dict[str, str]:
    """Return new names for tensors that a wrapper or a library renamed; names that are right are not among them.

    Args:
        names: the stored names.
        known: the base's names; without them a family's row alone decides.
        model_type: of the config.
    """
    starts = (*_SUSPECT_STARTS, *(live for live, _ in family_of(model_type).published))
    renames = {}
    for name in names:
        if not name.startswith(starts) and not _SUSPECT.search(name):
            continue
        if known is not None and name in known:
            continue
        new = _best_name(without_wrappers(name), known, model_type)
        if new != name:
            renames[name] = new
    return renames


def _best_name(bare: str, known: frozenset[str] | None, model_type: str) -> str:
    single = bare.removeprefix("model.") if bare.startswith("model.model.") else bare
    candidates = (published_name(bare, model_type), bare, single, published_name(single, model_type))
    if known is None:
        return candidates[-1]
    return next((candidate for candidate in candidates if candidate in known), bare)


def is_embedding(name: str, ends: frozenset[str]) -> bool:
    """Return whether a tensor is the weight of one of the modules `ends`."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in ends


def is_lora(name: str) -> bool:
    """Return whether a tensor is a factor of an adapter."""
    return ".lora_" in name and _LORA.search(name) is not None


@lru_cache(maxsize=16_384)
def is_vision(name: str) -> bool:
    """Return whether a tensor belongs to a vision (or audio) tower."""
    return _VISION.search(name) is not None


def stored_layers(names: Iterable[str]) -> set[int]:
    """Return the numbers of the text model's layers that have a tensor."""
    matches = ((name, _LAYER.search(name)) for name in names if "layers." in name)
    return {int(match.group(1)) for name, match in matches if match and not is_vision(name)}


def find_suffix(names: Mapping[str, object], suffix: str) -> str | None:
    """Return the shortest name outside the vision tower that ends with `suffix`, or None."""
    matching = [name for name in names if name.endswith(suffix)]
    return min((name for name in matching if not is_vision(name) and not is_lora(name)), key=len, default=None)
