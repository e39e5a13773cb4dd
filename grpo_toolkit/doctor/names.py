"""Tensor names: wrappers stripped, live names turned into published ones. Pure functions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from grpo_toolkit.doctor.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_WRAPPER: Final = re.compile(
    r"^(?:module\.|base_model\.model\.|_orig_mod\.)+|_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.|"
    r"\.base_layer(?=\.)|\.modules_to_save\.default(?=\.)"
)
_LORA: Final = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?=\.|$)")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")
_VISION: Final = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower)\.")


def is_lora(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return _LORA.search(name) is not None


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
    renames = {}
    for name in names:
        if known is not None and name in known:
            continue
        bare = without_wrappers(name)
        new = published(bare, model_type)
        doubled = bare.removeprefix("model.") if bare.startswith("model.model.") else bare
        for candidate in (new, bare, doubled, published(doubled, model_type)):
            if known is not None and candidate in known:
                new = candidate
                break
        else:
            new = published(doubled, model_type) if known is None else new
        if new != name:
            renames[name] = new
    return renames


def missing_layers(names: Iterable[str]) -> list[int]:
    """Numbers of text-model layers that are skipped between the first and the last stored one."""
    found = {int(match.group(1)) for name in names if not is_vision(name) for match in [_LAYER.search(name)] if match}
    return sorted(set(range(max(found))) - found) if found else []


def layer_count(names: Iterable[str]) -> int:
    """How many text-model layers are stored, by the highest number."""
    found = [int(match.group(1)) for name in names if not is_vision(name) for match in [_LAYER.search(name)] if match]
    return max(found) + 1 if found else 0


def find_suffix(names: Mapping[str, object], suffix: str) -> str | None:
    """The name that ends with `suffix` and does not belong to a vision tower, or None."""
    matching = (name for name in names if name.endswith(suffix) and not is_vision(name) and not is_lora(name))
    return min(matching, key=len, default=None)
