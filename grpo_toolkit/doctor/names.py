"""Tensor names: wrappers stripped, live names turned into published ones. Pure functions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.model_families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WRAPPER: Final = re.compile(
    r"^(?:module\.|base_model\.model\.|_orig_mod\.)+|_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.|"
    r"\.base_layer(?=\.)|\.modules_to_save\.default(?=\.)"
)
# Where a name has none of these it needs no closer look; almost none has.
_SUSPECT: Final = re.compile(r"_fsdp_|_orig_mod|_checkpoint_wrapped|base_layer|modules_to_save")
_SUSPECT_STARTS: Final = ("module.", "base_model.", "model.model.")
_LORA: Final = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?=\.|$)")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")
_VISION: Final = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower)\.")


def is_lora(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return ".lora_" in name and _LORA.search(name) is not None


def is_vision(name: str) -> bool:
    """Whether a tensor belongs to a vision (or audio) tower."""
    return _VISION.search(name) is not None


def without_wrappers(name: str) -> str:
    """The name as the model itself has it: prefixes of PEFT, DDP, FSDP and torch.compile removed."""
    return _WRAPPER.sub("", name)


def published(name: str, model_type: str) -> str:
    """A live tensor name as its family publishes it; the name itself where it is published already."""
    family = FAMILIES.get(model_type)
    for live, wanted in family.names if family else ():
        if name.startswith(live):
            return wanted + name.removeprefix(live)
    return name


def plan_renames(names: Iterable[str], known: frozenset[str] | None, model_type: str) -> dict[str, str]:
    """New names for tensors that a wrapper or a library renamed; names that are right are not in the result.

    Args:
        names: the stored names.
        known: the base's names; without them a family's table alone decides.
        model_type: of the config.
    """
    family = FAMILIES.get(model_type)
    starts = _SUSPECT_STARTS + tuple(live for live, _ in family.names) if family else _SUSPECT_STARTS
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
    candidates = (published(bare, model_type), bare, single, published(single, model_type))
    if known is None:
        return candidates[-1]
    return next((candidate for candidate in candidates if candidate in known), bare)


def stored_layers(names: Iterable[str]) -> set[int]:
    """Numbers of the text model's layers that have a tensor."""
    matches = ((name, _LAYER.search(name)) for name in names if "layers." in name)
    return {int(match.group(1)) for name, match in matches if match and not is_vision(name)}


def find_suffix(names: Mapping[str, object], suffix: str) -> str | None:
    """The name that ends with `suffix` and does not belong to a vision tower, or None."""
    matching = [name for name in names if name.endswith(suffix)]
    return min((name for name in matching if not is_vision(name) and not is_lora(name)), key=len, default=None)
