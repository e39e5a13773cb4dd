"""The vision towers of a live model, and those of their layers that attend segment by segment."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.cache_probe import vision_tower
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    import torch

GRID: Final = "grid_thw"
"""The argument in which towers take the shape of each image, [images, 3] as time, height and width in patches."""

EARLY: Final = ("4.49", "4.50", "4.51", "4.52")
LATER: Final = ("4.53", "4.54", "4.55", "4.56", "4.57")
OWN_FORWARD: Final = {
    "models.qwen2_vl.modeling_qwen2_vl.VisionSdpaAttention": EARLY,
    "models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionSdpaAttention": EARLY,
    "models.qwen2_vl.modeling_qwen2_vl.VisionAttention": LATER,
    "models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention": LATER,
}
"""Attention classes of transformers that get a forward of our own, with the releases in which they were tried. Nothing
is added to these any more. Up to 4.52 a class is chosen at loading; the one for "sdpa" masks all patches densely."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower and the attention layers in it that split their input by `cu_seqlens`."""

    name: str
    module: torch.nn.Module
    layers: tuple[torch.nn.Module, ...]


def find_towers(model: torch.nn.Module) -> list[Tower]:
    """Return the towers of a model: those with layers that attend over `cu_seqlens`, and the vision tower without."""
    inner = base_model(model)
    layers: dict[str, list[torch.nn.Module]] = {}
    for name, module in inner.named_modules():
        if takes_segments(module):
            layers.setdefault(_tower_of(inner, name), []).append(module)
    towers = [
        Tower(name=name, module=inner.get_submodule(name), layers=tuple(found)) for name, found in layers.items()
    ]
    plain = vision_tower(inner)
    if plain is not None and not any(_contains(tower.module, plain) for tower in towers):
        name = next(name for name, module in inner.named_modules() if module is plain)
        towers.append(Tower(name=name, module=plain, layers=()))
    return towers


def takes_segments(module: torch.nn.Module) -> bool:
    """Return whether this is a layer that attends segment by segment."""
    kind: Any = type(module)
    return is_attention_class(kind)


@cache
def is_attention_class(kind: Any) -> bool:
    """Return whether the class attends over `cu_seqlens` itself, rather than to hand it on to a layer inside."""
    forward = inspect.unwrap(kind.forward)
    if "cu_seqlens" not in inspect.signature(forward).parameters:
        return False
    return asks_by_name(kind) or has_own_forward(kind) or splits_segments(kind)


def asks_by_name(kind: type[torch.nn.Module]) -> bool:
    """Return whether the class makes one call for all segments if the attention is called "flash" (transformers 5)."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "is_flash_attention_requested" in code.co_names


def has_own_forward(kind: type[torch.nn.Module]) -> bool:
    """Return whether the class is in the closed list that `OWN_FORWARD` names, of a release that it was read in."""
    import transformers

    release = ".".join(transformers.__version__.split(".")[:2])
    # Among all classes it inherits from: FSDP2 puts one of its own in front.
    names = (f"{base.__module__}.{base.__name__}" for base in kind.__mro__)
    return any(release in OWN_FORWARD.get(name.removeprefix("transformers."), ()) for name in names)


def splits_segments(kind: type[torch.nn.Module]) -> bool:
    """Return whether the source of a class's forward splits rows by `cu_seqlens` in a loop, or masks them so."""
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    return "torch.split(tensor, lengths" in source or "range(1, len(cu_seqlens))" in source


def library_module(layer: torch.nn.Module) -> Any:
    """Return the module of transformers in which the class of a layer is written."""
    kind = next(base for base in type(layer).__mro__ if base.__module__.startswith("transformers.models."))
    return sys.modules[kind.__module__]


def forward_parameters(module: torch.nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward as its class wrote it, without `self`."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def takes_grid(module: torch.nn.Module) -> bool:
    """Return whether a module's forward takes the patches of all images and `grid_thw`."""
    first, *others = [*forward_parameters(module).parameters, ""]
    return GRID in others and first != "input_ids"


def _tower_of(inner: torch.nn.Module, layer: str) -> str:
    """Return the name of the outermost module around a layer that takes a grid, else of the model with its config."""
    from transformers import PreTrainedModel

    parts = layer.split(".")
    around = {".".join(parts[:end]): inner.get_submodule(".".join(parts[:end])) for end in range(len(parts))}
    config = getattr(inner.get_submodule(layer), "config", None)
    with_grid = [name for name, module in around.items() if takes_grid(module)]
    of_config = [
        name
        for name, module in around.items()
        if name and isinstance(module, PreTrainedModel) and module.config is config
    ]
    return (with_grid or of_config or [*around])[0]


def _contains(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    return any(inside is other for inside in module.modules()) or any(inside is module for inside in other.modules())
