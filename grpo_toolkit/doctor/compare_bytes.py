"""The comparison of weights by their bytes, on request: only this part of a diagnosis reads weights.

Standard library only.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.tensor_names import find_suffix, is_lora, is_vision, live_name, plan_renames
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors, read_chunks
from grpo_toolkit.checkpoint.weights.tensor_values import constant_value, correlation, is_finite, sample
from grpo_toolkit.doctor.parsed_folder import Digests

_SAME: Final = 0.25  # of the distance to its own tensor in the base
_KIN: Final = 0.9
_SEARCHED: Final = 50
"""The most tensors that are held against all others of their shape."""
_LAYER: Final = re.compile(r"\.layers\.([0-9]+)\.")
_IN_A_LAYER: Final = re.compile(r"\.[0-9]+\..*\.weight$|(?:embed_tokens|lm_head)\.weight$")
_POOLING: Final = re.compile(r"(?:^|\.)vision_tower\.(?:vision_model\.)?head\.")
_ROUNDING: Final = 2**-7  # what the cast of a value to bfloat16 changes at most

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder


def compare_heads(folder: Folder) -> Digests:
    """Compare only the stored head with the embedding."""
    tensors = folder.tensors
    head, embedding = find_suffix(tensors, "lm_head.weight"), find_suffix(tensors, "embed_tokens.weight")
    if head is None or embedding is None:
        return Digests()
    return Digests(heads_differ=not _equal(folder, tensors[head], folder, tensors[embedding]))


def compare_weights(folder: Folder) -> Digests:
    """Read the weights of a folder, and of its base as far as they are alike."""
    compared, is_the_base = _compare_with_base(folder)
    empty, broken = _empty_and_broken(folder)
    second = [info for name, info in folder.tensors.items() if ".lora_B" in name]
    return Digests(
        heads_differ=compare_heads(folder).heads_differ,
        compared=compared,
        is_the_base=is_the_base,
        is_zero=bool(second)
        and all(not any(map(any, read_chunks(folder.path, info, inside=True))) for info in second),
        empty=empty,
        broken=broken,
        unlike={name: origin for name, origin in _unlike(folder).items() if name not in {*empty, *broken}},
    )


def _unlike(folder: Folder) -> dict[str, str]:
    """Return the tensors whose sampled values do not correlate with the base's, where most of the others' do.

    Each has the base's tensor beside it whose values they are, if there is one.

    A training moves values by little of their spread; a swap, a transposition or a wrong shard leaves nothing of it.
    """
    base = folder.base
    if base is None or folder.kind is not Kind.MODEL or base.kind is not Kind.MODEL:
        return {}
    family = family_of(folder.model_type)
    renames = plan_renames(folder.tensors, frozenset(base.tensors), folder.model_type)
    published = {live_name(name, family): info for name, info in base.tensors.items()}
    unlike: dict[str, str] = {}
    compared, strange = 0, 0
    for name, info in sorted(folder.tensors.items()):
        other = published.get(live_name(renames.get(name, name), family))
        if other is None or other.shape != info.shape:
            continue
        ours, theirs = sample(folder.path, info), sample(base.path, other)
        alike, distance = correlation(ours, theirs), _distance(ours, theirs)
        compared += alike is not None
        is_moved = distance > _TRAINED * math.sqrt(len(ours))
        is_unlike = alike is not None and alike < _RELATED and (is_moved or len(info.shape) > 1)
        is_strange = is_moved and (alike is None or alike < _KIN)
        strange += is_strange
        origin = _origin(ours, distance, info, base) if is_strange and strange <= _SEARCHED else ""
        if (is_unlike or origin) and _has_effect(folder, name):
            unlike[name] = origin
    return unlike if 2 * len(unlike) <= max(compared, 2) else {}


def _distance(ours: list[float], theirs: list[float]) -> float:
    return math.dist(ours, theirs) if len(ours) == len(theirs) else 0.0


def _origin(ours: list[float], distance: float, info: TensorInfo, base: Folder) -> str:
    """Return the base's tensor of another name whose values a tensor has; empty where there is none.

    Of a few values a correlation says nothing; values far from the base's and near another tensor's do.
    """
    others = (name for name, other in base.tensors.items() if other.shape == info.shape)
    near = {name: _distance(ours, sample(base.path, base.tensors[name])) for name in others}
    name = min(near, key=near.__getitem__, default="")
    return name if name and len(ours) > 1 and near[name] < _SAME * distance else ""


_RELATED: Final = 0.5
_TRAINED: Final = 0.02
"""Adam moves any value by up to the learning rate a step: a bias or a norm whose values are near each other may well
lose its pattern, and moves by less than this on average."""


def _has_effect(folder: Folder, name: str) -> bool:
    """Return whether a tensor's values matter: a bias of keys adds the same to all scores of a query.

    Softmax takes that away again, where positions are learned (CLIP, SigLIP) and do not rotate the keys.
    """
    if _is_not_asked(folder, name):
        return False
    is_key_bias = is_vision(name) and name.endswith((".k_proj.bias", ".key.bias"))
    return not (is_key_bias and any("position_embedding" in other for other in folder.tensors))


def _is_not_asked(folder: Folder, name: str) -> bool:
    """Return whether a tower has a tensor that the language model never asks.

    SigLIP's head pools a picture, which LLaVA's kin do not; nor do they read the last norm where they take an earlier
    layer's features.
    """
    layer = folder.get(CONFIG, "vision_feature_layer")
    is_earlier = type(layer) is int and layer < -1
    # CLIP's stands behind the pooled token alone.
    is_of_clip = folder.get(CONFIG, "vision_config", "model_type") == "clip_vision_model"
    is_last_norm = ".post_layernorm." in name and is_vision(name) and (is_earlier or is_of_clip)
    is_behind = is_earlier and _is_behind(folder, name, layer)
    return is_last_norm or is_behind or _POOLING.search(name) is not None


def _is_behind(folder: Folder, name: str, layer: int) -> bool:
    """Return whether a tensor is of a layer of the tower behind the one whose output is taken, -1 being the last."""
    count = folder.get(CONFIG, "vision_config", "num_hidden_layers")
    own = _LAYER.search(name) if is_vision(name) else None
    return type(count) is int and own is not None and int(own[1]) > count + layer


def inspect_values(folder: Folder) -> Digests:
    """Compare only the head with the embedding, and look for tensors without information."""
    empty, broken = _empty_and_broken(folder)
    return Digests(heads_differ=compare_heads(folder).heads_differ, empty=empty, broken=broken)


def _empty_and_broken(folder: Folder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors that are one value throughout, and those with a NaN or an infinity.

    Some are so when they are made: a bias of zeros, a norm of ones, a projection that starts from zero. They count
    where the base's are not so, in whatever dtype; without a base only matrices inside the layers do.
    """
    base = folder.base if folder.kind is Kind.MODEL else None
    others = {} if base is None else base.tensors
    renames = plan_renames(folder.tensors, frozenset(others) or None, folder.model_type)
    empty, broken = [], []
    value_of = cache(lambda name: constant_value(folder.path, folder.tensors[name]))
    for name, info in folder.tensors.items():
        if _is_not_asked(folder, name):
            continue
        if not is_finite(folder.path, info):
            broken.append(name)
        elif is_lora(name):
            if _is_untrained(folder, name, value_of):
                empty.append(name)
        elif folder.kind is Kind.MODEL:
            value = value_of(name)
            other = others.get(renames.get(name, name))
            if value is None:
                continue
            if other is None or base is None:
                is_as_made = _IN_A_LAYER.search(name) is None or len(info.shape) < 2
            else:
                theirs = constant_value(base.path, other)
                is_as_made = theirs is not None and math.isclose(value, theirs, rel_tol=_ROUNDING)
            if not is_as_made and _has_effect(folder, name):
                empty.append(name)
    return tuple(sorted(empty)), tuple(sorted(broken))


def _is_untrained(folder: Folder, name: str, value_of: Callable[[str], float | None]) -> bool:
    """Return whether a factor is one value throughout, and that not because nothing was trained yet.

    First factors are drawn at random. Second ones begin as zeros, and stay so where no gradient comes: such as in the
    last layers of a tower, or in all of them before the first step.
    """
    value = value_of(name)
    if value is None or math.prod(folder.tensors[name].shape) < _SOME:
        return False
    if value != 0 or ".lora_A." in name:
        return True
    if ".lora_B." not in name or is_vision(name):
        return False
    kind = _LAYER_NUMBER.sub(".", name)
    sisters = (other for other in folder.tensors if other != name and _LAYER_NUMBER.sub(".", other) == kind)
    return any(value_of(other) is None for other in sisters)


_LAYER_NUMBER: Final = re.compile(r"\.[0-9]+\.")
_SOME: Final = 8


def _compare_with_base(folder: Folder) -> tuple[int, bool]:
    base = folder.base
    if base is None:
        return 0, False
    family = family_of(folder.model_type)
    renames = plan_renames(folder.tensors, frozenset(base.tensors), folder.model_type)
    published = {live_name(name, family): info for name, info in base.tensors.items()}
    compared = 0
    for name, info in folder.tensors.items():
        other = published.get(live_name(renames.get(name, name), family))
        if other is not None:
            if not _equal(folder, info, base, other):
                return compared, False
            compared += 1
    return compared, compared > 0


def _equal(ours: Folder, one: TensorInfo, theirs: Folder, other: TensorInfo) -> bool:
    return equal_tensors(ours.path, one, theirs.path, other, inside=True)
