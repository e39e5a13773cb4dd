"""PEFT's `target_parameters`: adapters on parameters that are no layer's weight, most often on stacked experts.

PEFT wraps the module once for each of its parameters, and saves the wrappers' factors without saying which parameter
they are for: shapes tell. transformers 5 stacks the experts that checkpoints store one by one
(https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.module_lookup import expert_names
from grpo_toolkit.checkpoint.tensor_names import live_name
from grpo_toolkit.errors import CheckpointError, UnsupportedError
from grpo_toolkit.merge.adapter import is_named
from grpo_toolkit.merge.low_rank import LowRank, Update, scaling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.merge.adapter import Adapter, Module


def parameter_updates(adapter: Adapter, base: Base, name: str, modules: list[Module]) -> list[tuple[str, Update]]:
    """Plan the updates of one module's parameters (`target_parameters`): each wrapper around it is for one of them."""
    names = sorted({target.rpartition(".")[2] for target in adapter.config.get("target_parameters") or ()})
    names = [leaf for leaf in names if any(is_named(f"{name}.{leaf}", t) for t in adapter.config["target_parameters"])]
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
    """The rows of one expert (or of all of them stacked) that a stored tensor holds."""

    stored: str
    expert: int | None
    first: int
    rows: int


def _stored_parts(base: Base, live: str) -> list[_Part]:
    """Return the names under which a parameter is stored: one, or one for each expert and part; none if it is not."""
    if live in base.stored:
        stored = base.stored[live]
        return (
            [_Part(stored, None, 0, base.tensors[stored].shape[-2])]
            if len(base.tensors[stored].shape) in (2, 3)
            else []
        )
    found: list[_Part] = []
    for expert, names in enumerate(expert_names(live, base.stored)):
        first = 0
        for name in names:
            stored = base.stored[name]
            rows = base.tensors[stored].shape[0]
            found.append(_Part(stored, expert, first, rows))
            first += rows
    return found


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
    scale = scale_of(adapter, f"{module.name}.{leaf}", a_shape[0] // (experts or 1))
    added = LowRank(a=a, b=b, scale=scale, is_transposed=not fits, experts=experts)
    return [
        (
            part.stored,
            Update(added=replace(added, part=None if part.expert is None else (part.expert, part.first, part.rows))),
        )
        for part in parts
    ]


def containers_without_factors(adapter: Adapter, base: Base, spelled: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the stacks of experts that the config targets, but for which the adapter lacks factors of some parameter.

    Args:
        adapter: the adapter.
        base: its base.
        spelled: what the adapter's names begin with, and the live model's in their place.
    """
    targets = adapter.config.get("target_parameters") or ()
    leaves = {target.rpartition(".")[2] for target in targets}
    counts: dict[str, int] = {}
    for module in adapter.modules:
        counts[module.name] = counts.get(module.name, 0) + 1
    for container in sorted(
        {live.partition(".experts.")[0] + ".experts" for live in base.stored if ".experts." in live}
    ):
        names = {ours + container.removeprefix(theirs) for ours, theirs in spelled if container.startswith(theirs)}
        wanted = {
            leaf
            for leaf in leaves
            for name in names
            if any(is_named(f"{name}.{leaf}", target) for target in targets)
            and _stored_parts(base, f"{container}.{leaf}")
        }
        if wanted and len(wanted) != max(counts.get(name, 0) for name in names):
            yield container


def scale_of(adapter: Adapter, name: str, rank: int) -> float:
    """Return the number that a module's factors are multiplied with.

    Raises:
        CheckpointError: their rank is none, or not the config's.
    """
    if rank < 1:
        raise CheckpointError(f"{adapter.weights}: {name} is empty: it was saved while sharded, and not gathered")
    if rank != adapter.rank(name):
        raise CheckpointError(
            f"{adapter.weights}: {name} has rank {rank}, but by its config it should be {adapter.rank(name)}"
        )
    return scaling(alpha=adapter.alpha(name), rank=rank, use_rslora=bool(adapter.config.get("use_rslora")))
