"""The plan of a merge: the stored tensors that an adapter changes, and how, from headers and configs alone.

Everything that would make a merge something else than what was trained is found here, before a weight is read: a
module that the base does not have, factors of another shape, a layer of the adapter that is missing, tied embeddings
that a merge would untie, quantised weights.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.tensor_names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, is_embedding, live_name
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors
from grpo_toolkit.errors import CheckpointError, UnsupportedError
from grpo_toolkit.merge.experts import containers_without_factors, parameter_updates, scale_of
from grpo_toolkit.merge.low_rank import Bias, LowRank, Update
from grpo_toolkit.model.unheld_tensors import unheld_in_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.merge.adapter import Adapter, Module


def plan_updates(adapter: Adapter, base: Base) -> dict[str, Update]:
    """Plan what happens to each stored tensor that the adapter changes.

    Raises:
        CheckpointError: tensors that do not fit the base, or an adapter that is not whole.
        UnsupportedError: a merge would untie embeddings, or the weights are of a kind that is not merged.
    """
    if not base.tensors:
        raise CheckpointError(f"{base.path}: no model.safetensors and no index of one; only safetensors are read")
    if base.config.get("quantization_config"):
        raise UnsupportedError(f"{base.path / CONFIG}: quantization_config is set; name the unquantised base (--base)")
    updates: dict[str, Update] = {}
    homeless: list[str] = []
    for name, tensor in adapter.replaced.items():
        stored = base.stored.get(live_name(name, base.family))
        if stored is None:
            homeless.append(name)
            continue
        _check_replaced(adapter, base, tensor, stored)
        updates[stored] = Update(replaced_by=tensor)
    for name, modules in _by_name(adapter).items():
        found = _module_updates(adapter, base, name, modules)
        if not found:
            homeless.append(name)
        for stored, update in found:
            earlier = updates.get(stored, Update())
            if earlier.added is not None:
                raise CheckpointError(f"{adapter.weights}: two modules of the adapter lead to {stored} of {base.path}")
            updates[stored] = replace(update, replaced_by=earlier.replaced_by)
    homeless = _without_tied_heads(adapter, base, homeless)
    is_apart = base.is_tied and not adapter.config.get("ensure_weight_tying")
    if homeless and is_apart and all(_HEAD_OF_ITS_OWN.search(name) for name in homeless):
        raise _untying(adapter, homeless[0])  # the head of a tied base has no tensor in its files
    if homeless:
        example = next(iter(base.stored))
        raise CheckpointError(
            f"{adapter.weights}: {len(homeless)} of its modules are not in {base.path}: {', '.join(homeless[:4])}"
            f"{', ...' if len(homeless) > 4 else ''}; the base has names like {example}. Is it this adapter's base "
            "(--base)?"
        )
    _refuse_untying(adapter, base, updates)
    _refuse_gaps(adapter, base)
    for stored in updates:
        if base.tensors[stored].dtype not in FLOAT_NAMES:
            raise UnsupportedError(f"{base.path}: {stored} is {base.tensors[stored].dtype}, which is not merged into")
    return updates


def _by_name(adapter: Adapter) -> dict[str, list[Module]]:
    """Group modules by name, each with its wrappers from the innermost out."""
    grouped: dict[str, list[Module]] = defaultdict(list)
    for module in sorted(adapter.modules, key=lambda module: -module.depth):
        grouped[module.name].append(module)
    return grouped


def _module_updates(adapter: Adapter, base: Base, name: str, modules: list[Module]) -> list[tuple[str, Update]]:
    live = live_name(name, base.family)
    weight = base.stored.get(f"{live}.weight")
    if weight is not None and len(modules) == 1:
        return list(_layer_updates(adapter, base, modules[0], weight, base.stored.get(f"{live}.bias")))
    return parameter_updates(adapter, base, name, modules)


def _layer_updates(
    adapter: Adapter, base: Base, module: Module, weight: str, bias: str | None
) -> Iterator[tuple[str, Update]]:
    factors = module.factors
    is_lookup = "lora_embedding_A" in factors
    a, b = (
        (factors["lora_embedding_A"], factors["lora_embedding_B"])
        if is_lookup
        else (factors["lora_A"], factors["lora_B"])
    )
    shape = base.tensors[weight].shape
    a_shape, b_shape = adapter.tensors[a].shape, adapter.tensors[b].shape
    fits = a_shape[1:] == shape[1:] and b_shape == (shape[0], a_shape[0], *(1 for _ in shape[2:]))
    fits_transposed = len(shape) == 2 and a_shape[1:] == shape[:1] and b_shape == (shape[1], a_shape[0])
    if is_lookup or (fits and fits_transposed and adapter.config.get("fan_in_fan_out")):
        fits = False
    if not (fits or fits_transposed):
        raise _misfit(adapter, base, module.name, f"{a_shape} and {b_shape}", f"{weight} of {shape}")
    scale = scale_of(adapter, module.name, a_shape[0])
    magnitude = factors.get("lora_magnitude_vector")
    if (magnitude is not None) is not bool(adapter.config.get("use_dora")):
        raise CheckpointError(f"{adapter.weights}: {module.name}: DoRA's magnitudes and use_dora do not agree")
    if magnitude is not None:
        lengths = shape[0] if fits else shape[1]
        if math.prod(adapter.tensors[magnitude].shape) != lengths:
            raise _misfit(
                adapter, base, module.name, f"{adapter.tensors[magnitude].shape} magnitudes", f"{lengths} outputs"
            )
    yield weight, Update(added=LowRank(a=a, b=b, scale=scale, is_transposed=not fits), magnitude=magnitude)
    if "lora_B.bias" in factors:
        if bias is None:
            raise UnsupportedError(f"{adapter.path}: lora_bias is set, but {module.name} has no bias in {base.path}")
        yield bias, Update(added=Bias(vector=factors["lora_B.bias"], scale=scale))


def _check_replaced(adapter: Adapter, base: Base, tensor: str, stored: str) -> None:
    found, wanted = adapter.tensors[tensor], base.tensors[stored]
    if found.shape != wanted.shape:
        hint = ""
        if is_embedding(live_name(stored, base.family), INPUT_EMBEDDINGS | OUTPUT_EMBEDDINGS):
            hint = "; the vocabulary was resized: save the resized base, and pass its folder (--base)"
        raise CheckpointError(
            f"{adapter.weights}: {tensor} is {found.shape}, {stored} of {base.path} {wanted.shape}{hint}"
        )


def _without_tied_heads(adapter: Adapter, base: Base, homeless: list[str]) -> list[str]:
    """Leave out the trained heads that PEFT kept tied (`ensure_weight_tying`): they are stored as the embeddings."""
    if not (base.is_tied and adapter.config.get("ensure_weight_tying")):
        return homeless
    replaced = {live_name(name, base.family): tensor for name, tensor in adapter.replaced.items()}
    inputs = [tensor for name, tensor in replaced.items() if is_embedding(name, INPUT_EMBEDDINGS)]
    tied = {
        name
        for name in homeless
        if is_embedding(live := live_name(name, base.family), OUTPUT_EMBEDDINGS)
        and any(_is_same(adapter, replaced[live], tensor) for tensor in inputs)
    }
    return [name for name in homeless if name not in tied]


def _is_same(adapter: Adapter, one: str, other: str) -> bool:
    return equal_tensors(adapter.path, adapter.tensors[one], adapter.path, adapter.tensors[other])


def _refuse_untying(adapter: Adapter, base: Base, updates: Mapping[str, Update]) -> None:
    if not base.is_tied:
        return
    for stored, update in updates.items():
        live = live_name(stored, base.family)
        if not is_embedding(live, INPUT_EMBEDDINGS | OUTPUT_EMBEDDINGS):
            continue
        is_whole = update.added is None and update.magnitude is None
        if is_whole and adapter.config.get("ensure_weight_tying"):
            continue
        raise _untying(adapter, stored)


_HEAD_OF_ITS_OWN = re.compile(r"(?:^|\.)lm_head\.(?:weight|modules_to_save|original_module)")


def _untying(adapter: Adapter, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.path}: changes {name}, which the base ties to its other end: a merge would untie them; leave "
        "embed_tokens and lm_head out of the adapter, or train them with modules_to_save and ensure_weight_tying"
    )


def _refuse_gaps(adapter: Adapter, base: Base) -> None:
    """Raise where a layer has no factors though its siblings have and the config asks for them: a torn file.

    Layers of the base that its class does not hold (heads that predict several tokens ahead) never had any.
    """
    present = {module.name for module in adapter.modules}
    prefixes = {_prefixes(name, live_name(name, base.family)) for name in present}
    lacking = list(containers_without_factors(adapter, base, prefixes))
    for live, stored in base.stored.items():
        module, _, leaf = live.rpartition(".")
        if leaf != "weight" or len(base.tensors[stored].shape) < 2 or ".experts." in module:
            continue
        spelled = {ours + module.removeprefix(theirs) for ours, theirs in prefixes if module.startswith(theirs)}
        if spelled and not spelled & present and any(adapter.targets(name) for name in spelled):
            lacking.append(module)
    if lacking:
        tensors = {module: _tensors_in(base, module) for module in lacking}
        unheld = unheld_in_folder(base.path, base.tensors, tensors)
        lacking = [module for module in lacking if module not in unheld]
    if lacking:
        raise CheckpointError(
            f"{adapter.weights}: has no factors for {len(lacking)} modules that its config targets: "
            f"{', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}; it is not whole"
        )


def _tensors_in(base: Base, module: str) -> set[str]:
    return {stored for live, stored in base.stored.items() if live.startswith(f"{module}.")}


def _prefixes(one: str, other: str) -> tuple[str, str]:
    """Return what two spellings of a name begin with, without the segments that they end with alike."""
    ours, theirs = one.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _misfit(adapter: Adapter, base: Base, name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{adapter.weights}: {name}: factors of {found} do not fit {expected} in {base.path}")
