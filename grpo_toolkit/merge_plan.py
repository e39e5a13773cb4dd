"""Which stored tensor of a base each tensor of an adapter changes, and how: decided from headers and configs alone.

Everything that would make a merge something else than what was trained is found here, before a weight is read: a
module that the base does not have, factors of another shape, a layer of the adapter that is missing, tied embeddings
that a merge would untie, quantised weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint import CONFIG, Checkpoint, JsonObject, Kind, TensorInfo, read_json
from grpo_toolkit.errors import CheckpointError, UnsupportedError
from grpo_toolkit.lora import Bias, LowRank, Update, scaling
from grpo_toolkit.names import (
    EXPERT_PARTS,
    INPUT_EMBEDDINGS,
    OUTPUT_EMBEDDINGS,
    Family,
    family_of,
    is_embedding,
    live_name,
    names_by_live,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from grpo_toolkit.adapter import Adapter, Module

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base folder as a merge sees it: its stored tensors, and where the live model's names are stored."""

    path: Path
    config: JsonObject
    family: Family
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]

    @property
    def is_tied(self) -> bool:
        """Whether the output embeddings are the input embeddings."""
        text = self.config.get("text_config")
        levels = [self.config, text if isinstance(text, dict) else {}]
        flags = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
        has_head = any(is_embedding(name, OUTPUT_EMBEDDINGS) for name in self.stored)
        return any(flags) or not (has_head or flags)

    @property
    def vocabulary(self) -> int | None:
        """How many rows the input embeddings have, or None where no tensor is known to be them."""
        stored = [name for live, name in self.stored.items() if is_embedding(live, INPUT_EMBEDDINGS)]
        return self.tensors[stored[0]].shape[0] if len(stored) == 1 else None


def open_base(checkpoint: Checkpoint) -> Base:
    """Read a base folder's headers.

    Raises:
        CheckpointError: not stored as safetensors.
        UnsupportedError: an adapter itself.
    """
    path = checkpoint.path
    if checkpoint.kind is Kind.ADAPTER:
        raise UnsupportedError(f"{path}: is an adapter itself; merge it into its base first, then merge into that")
    config = read_json(path / CONFIG)
    tensors = checkpoint.tensors()
    if not tensors:
        raise CheckpointError(f"{path}: no model.safetensors and no index of one; only safetensors are read")
    family = family_of(config.get("model_type"))
    return Base(path=path, config=config, family=family, tensors=tensors, stored=names_by_live(tensors, family))


def plan_updates(adapter: Adapter, base: Base) -> dict[str, Update]:
    """What happens to each stored tensor that the adapter changes.

    Raises:
        CheckpointError: tensors that do not fit the base, or an adapter that is not whole.
        UnsupportedError: a merge would untie embeddings, or the weights are of a kind that is not merged.
    """
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
        if base.tensors[stored].dtype not in FLOATS:
            raise UnsupportedError(f"{base.path}: {stored} is {base.tensors[stored].dtype}, which is not merged into")
    return updates


def _by_name(adapter: Adapter) -> dict[str, list[Module]]:
    """Modules by name, each with its wrappers from the innermost out."""
    grouped: dict[str, list[Module]] = defaultdict(list)
    for module in sorted(adapter.modules, key=lambda module: -module.depth):
        grouped[module.name].append(module)
    return grouped


def _module_updates(adapter: Adapter, base: Base, name: str, modules: list[Module]) -> list[tuple[str, Update]]:
    live = live_name(name, base.family)
    weight = base.stored.get(f"{live}.weight")
    if weight is not None and len(modules) == 1:
        return list(_layer_updates(adapter, base, modules[0], weight, base.stored.get(f"{live}.bias")))
    return _parameter_updates(adapter, base, name, modules)


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
    scale = _scale(adapter, module.name, a_shape[0])
    magnitude = factors.get("lora_magnitude_vector")
    if (magnitude is not None) is not bool(adapter.config.get("use_dora")):
        raise CheckpointError(f"{adapter.weights}: {module.name}: DoRA's magnitudes and use_dora do not agree")
    if magnitude is not None:
        lengths = shape[0] if fits else shape[1]
        if _size(adapter.tensors[magnitude].shape) != lengths:
            raise _misfit(
                adapter, base, module.name, f"{adapter.tensors[magnitude].shape} magnitudes", f"{lengths} outputs"
            )
    yield weight, Update(added=LowRank(a=a, b=b, scale=scale, is_transposed=not fits), magnitude=magnitude)
    if "lora_B.bias" in factors:
        if bias is None:
            raise UnsupportedError(f"{adapter.path}: lora_bias is set, but {module.name} has no bias in {base.path}")
        yield bias, Update(added=Bias(vector=factors["lora_B.bias"], scale=scale))


def _parameter_updates(adapter: Adapter, base: Base, name: str, modules: list[Module]) -> list[tuple[str, Update]]:
    """`target_parameters`: wrappers around one module, each for a parameter of it, most often stacked experts."""
    names = sorted({target.rpartition(".")[2] for target in adapter.config.get("target_parameters") or ()})
    names = [leaf for leaf in names if any(_ends(f"{name}.{leaf}", t) for t in adapter.config["target_parameters"])]
    parameters = {
        leaf: parts for leaf in names if (parts := _stored_parts(base, f"{live_name(name, base.family)}.{leaf}"))
    }
    found: list[tuple[str, Update]] = []
    for module in modules:
        fitting = {
            leaf: fit
            for leaf, parts in parameters.items()
            if (fit := _fit_experts(adapter, base, module, leaf, parts))
        }
        if len(fitting) > 1:
            raise UnsupportedError(
                f"{adapter.weights}: {module.name}: its factors fit {' and '.join(sorted(fitting))} alike, so what "
                "they were trained for cannot be told"
            )
        if not fitting:
            return []
        [(leaf, updates)] = fitting.items()
        del parameters[leaf]
        found += updates
    return found


@dataclass(frozen=True)
class _Part:
    """Rows of one expert (or of all of them stacked) that a stored tensor holds."""

    stored: str
    expert: int | None
    first: int
    rows: int


def _stored_parts(base: Base, live: str) -> list[_Part]:
    """Where a parameter is stored: as it lives, or a tensor for each expert and part; empty where it is not."""
    if live in base.stored:
        stored = base.stored[live]
        return (
            [_Part(stored, None, 0, base.tensors[stored].shape[-2])]
            if len(base.tensors[stored].shape) in (2, 3)
            else []
        )
    module, _, leaf = live.rpartition(".")
    for names in EXPERT_PARTS.get(leaf, ()):
        parts: list[_Part] = []
        expert = 0
        while all(f"{module}.{expert}.{name}.weight" in base.stored for name in names):
            first = 0
            for name in names:
                stored = base.stored[f"{module}.{expert}.{name}.weight"]
                rows = base.tensors[stored].shape[0]
                parts.append(_Part(stored, expert, first, rows))
                first += rows
            expert += 1
        if parts:
            return parts
    return []


def _fit_experts(
    adapter: Adapter, base: Base, module: Module, leaf: str, parts: list[_Part]
) -> list[tuple[str, Update]]:
    a, b = module.factors["lora_A"], module.factors["lora_B"]
    a_shape, b_shape = adapter.tensors[a].shape, adapter.tensors[b].shape
    shape = base.tensors[parts[0].stored].shape
    if parts[0].expert is None:
        experts, rows, columns = shape if len(shape) == 3 else (0, *shape)
    else:
        experts = 1 + max(part.expert or 0 for part in parts)
        rows, columns = max(part.first + part.rows for part in parts), shape[1]
    fits = (a_shape[1], b_shape[0]) == (columns, rows)
    fits_transposed = bool(experts) and (a_shape[1], b_shape[0]) == (rows, columns)
    if a_shape[0] != b_shape[1] or a_shape[0] % (experts or 1) or not (fits or fits_transposed):
        return []
    if fits and fits_transposed:
        raise UnsupportedError(
            f"{base.path}: {leaf} of {module.name} has square experts ({rows} by {columns}), and versions of PEFT "
            "differ in which way they adapt those"
        )
    scale = _scale(adapter, f"{module.name}.{leaf}", a_shape[0] // (experts or 1))
    added = LowRank(a=a, b=b, scale=scale, is_transposed=not fits, experts=experts)
    return [
        (
            part.stored,
            Update(added=replace(added, part=None if part.expert is None else (part.expert, part.first, part.rows))),
        )
        for part in parts
    ]


def _scale(adapter: Adapter, name: str, rank: int) -> float:
    if rank != adapter.rank(name):
        raise CheckpointError(
            f"{adapter.weights}: {name} has rank {rank}, but by its config it should be {adapter.rank(name)}"
        )
    return scaling(alpha=adapter.alpha(name), rank=rank, use_rslora=bool(adapter.config.get("use_rslora")))


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
    """A trained head of a tied base that PEFT kept tied (`ensure_weight_tying`) is stored with the embeddings."""
    if not (base.is_tied and adapter.config.get("ensure_weight_tying")):
        return homeless
    replaced = {live_name(name, base.family) for name in adapter.replaced}
    if not any(is_embedding(name, INPUT_EMBEDDINGS) for name in replaced):
        return homeless
    return [name for name in homeless if not is_embedding(live_name(name, base.family), OUTPUT_EMBEDDINGS)]


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
        raise UnsupportedError(
            f"{adapter.path}: changes {stored}, which the base ties to its other end: a merge would untie them; leave "
            "embed_tokens and lm_head out of the adapter, or train them with modules_to_save and ensure_weight_tying"
        )


def _refuse_gaps(adapter: Adapter, base: Base) -> None:
    """Raise where a layer has no factors though its siblings have and the config asks for them: a torn file."""
    present = {module.name for module in adapter.modules}
    prefixes = {_prefixes(name, live_name(name, base.family)) for name in present}
    lacking = []
    for live, stored in base.stored.items():
        module, _, leaf = live.rpartition(".")
        if leaf != "weight" or len(base.tensors[stored].shape) < 2 or ".experts." in module:
            continue
        spelled = {ours + module.removeprefix(theirs) for ours, theirs in prefixes if module.startswith(theirs)}
        if spelled and not spelled & present and any(adapter.targets(name) for name in spelled):
            lacking.append(module)
    if lacking:
        raise CheckpointError(
            f"{adapter.weights}: has no factors for {len(lacking)} modules that its config targets: "
            f"{', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}; it is not whole"
        )


def _prefixes(one: str, other: str) -> tuple[str, str]:
    """What two spellings of a name begin with, without the segments that they end with alike."""
    ours, theirs = one.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _misfit(adapter: Adapter, base: Base, name: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{adapter.weights}: {name}: factors of {found} do not fit {expected} in {base.path}")


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
