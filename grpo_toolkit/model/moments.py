"""An optimizer's moments, matched by the names of their parameters.

A trainer saves and loads them by position: first the parameters with weight decay, as the model lists them, then the
others. Both lists hang on the version of transformers: 4.49 lets the weights of an RMSNorm decay and later versions do
not, and 5 trains one parameter for a stack of experts where 4.x trains one for each. Such a resume stops with a group
"that doesn't match the size of optimizer's group", or, where the sizes agree by chance, goes on with the moments of
other parameters. So the names are kept in the optimizer's own groups, from where every save takes them along, and a
state that is loaded is brought into this model's order by them first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.model_families import EXPERT_PARTS
from grpo_toolkit.checkpoint.module_lookup import expert_names
from grpo_toolkit.checkpoint.tensor_names import live_name

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    import torch

    from grpo_toolkit.checkpoint.model_families import Family

    State = dict[str, Any]
    """An optimizer's state of one parameter: `step`, `exp_avg`, `exp_avg_sq`, or what else it keeps."""
    Names = Sequence[Sequence[str]]
    """The names of an optimizer's parameters, group by group."""

NAMES: Final = "parameter_names"
"""The key of an optimizer's group that holds the names of its parameters. Not torch's `param_names`: with that in one
group, groups that are added later have to have it, too."""

_ELEMENTWISE: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_NORM: Final = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_EXPERT: Final = re.compile(r"((?:.+\.)?experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Match:
    """A saved optimizer state in the order of a live one.

    Attributes:
        state: what `load_state_dict` takes.
        total: how many of the live parameters have moments.
        moved: how many of them stood elsewhere in the saved state.
        source: what their names come from.
        lacking: live parameters without moments, although others have some.
        foreign: names of saved moments that belong to no live parameter.
        uneven: stacks of experts that had taken different numbers of steps one by one; the largest is theirs now.
    """

    state: dict[str, Any]
    total: int
    moved: int
    source: str
    lacking: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    uneven: tuple[str, ...] = ()

    @property
    def is_rearranged(self) -> bool:
        """Return whether the live optimizer has moments elsewhere, or others, than it would have had by itself."""
        return bool(self.moved or self.foreign or self.uneven)

    def __str__(self) -> str:
        said = f"the optimizer's moments of all {self.total} parameters are the checkpoint's, {self.source}"
        if self.moved:
            said += f" ({self.moved} stood elsewhere: it was saved by another version)"
        if self.foreign:
            said += f"; {len(self.foreign)} belong to no parameter in training ({self.foreign[0]}, ...)"
        if self.uneven:
            said += f"; experts that had taken fewer steps than others of their stack count as many ({self.uneven[0]})"
        return said


def named_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[list[str]] | None:
    """Return the names of an optimizer's parameters, or None where some are not the model's own (ZeRO's are flat)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    found = [[name for name in group if name is not None] for group in groups]
    return found if any(found) and all(None not in group for group in groups) else None


def matched(saved: Mapping[str, Any], live: Names, model: torch.nn.Module, family: Family) -> Match | None:
    """Bring a saved optimizer state into the order of a live one.

    Args:
        saved: what `state_dict` returned, perhaps under another version of transformers.
        live: the names of the live optimizer's parameters.
        model: the model that they are of.
        family: the row of its model type, which knows other spellings of the names.

    Returns:
        The match; None where nothing tells which moments are whose.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    named = _saved_names(saved)
    if named is not None:
        return _by_name(saved, named, live, shapes, family, source="by name")
    layouts = [live, *_layouts({name for group in live for name in group}, model)]
    fitting = [layout for layout in layouts if _fits(saved, layout, shapes)]
    if not fitting:
        return None
    source = "by position" if fitting[0] is live else "by the order that the version which saved them has"
    return _by_name(saved, fitting[0], live, shapes, family, source=source)


def _saved_names(saved: Mapping[str, Any]) -> list[list[str]] | None:
    groups = saved["param_groups"]
    found = [group.get(NAMES) or group.get("param_names") or [] for group in groups]
    is_whole = all(len(names) == len(group["params"]) for names, group in zip(found, groups, strict=True))
    return found if is_whole else None


def _layouts(trained: Container[str], model: torch.nn.Module) -> Iterator[list[list[str]]]:
    """Yield the groups that trainers of other versions make of the same parameters.

    transformers up to 4.49 takes from weight decay what is called a bias and what is in a LayerNorm, later ones what
    is called a norm, too (`Trainer.get_decay_parameter_names`).
    """
    from torch.nn import LayerNorm

    in_layer_norm = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, LayerNorm)
        for name, _ in module.named_parameters()
    }
    names = [name for name, _ in model.named_parameters() if name in trained]
    for free_of_decay in ("bias", _NORM.pattern):
        free = {name for name in names if name in in_layer_norm or re.search(free_of_decay, name.lower())}
        yield [[name for name in names if name not in free], [name for name in names if name in free]]


def _fits(saved: Mapping[str, Any], layout: Names, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    groups = [group["params"] for group in saved["param_groups"]]
    if [len(group) for group in groups] != [len(group) for group in layout]:
        return False
    pairs = zip((one for group in groups for one in group), (name for group in layout for name in group), strict=True)
    return all(_is_of(saved["state"].get(index, {}), shapes[name]) for index, name in pairs)


def _is_of(state: State, shape: tuple[int, ...]) -> bool:
    return all(tuple(state[key].shape) == shape for key in _ELEMENTWISE if key in state)


def _by_name(
    saved: Mapping[str, Any],
    named: Names,
    live: Names,
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    *,
    source: str,
) -> Match:
    places: dict[str, Any] = {}
    for group, names in zip(saved["param_groups"], named, strict=True):
        places |= {live_name(name, family): place for place, name in zip(group["params"], names, strict=True)}
    states = {name: saved["state"][place] for name, place in places.items() if place in saved["state"]}
    used: set[str] = set()
    state: dict[int, State] = {}
    groups, lacking, uneven, moved, index = [], [], [], 0, 0
    for number, names in enumerate(live):
        positions = range(index, index + len(names))
        index += len(names)
        for position, name in zip(positions, names, strict=True):
            own = live_name(name, family)
            found, sources = _state_of(own, states, saved=places)
            used.update(sources)
            if found is None or not _is_of(found, shapes[name]):
                lacking += [name] if own not in places or found is not None else []
                continue
            state[position] = found
            moved += sources != [own] or places[own] != position
            uneven += [own] if len({int(states[one].get("step", 0)) for one in sources}) > 1 else []
        settings = saved["param_groups"][min(number, len(saved["param_groups"]) - 1)]
        groups.append({**settings, "params": list(positions), NAMES: list(names)})
    return Match(
        state={**saved, "state": state, "param_groups": groups},
        total=len(state),
        moved=moved,
        source=source,
        lacking=tuple(lacking),
        foreign=tuple(sorted(states.keys() - used)),
        uneven=tuple(uneven),
    )


def _state_of(name: str, states: Mapping[str, State], *, saved: Mapping[str, Any]) -> tuple[State | None, list[str]]:
    """Return the saved state of a live parameter and the names that it is made of; experts are stacked or taken out.

    Args:
        name: the parameter's.
        states: the saved states by name; one that never had a gradient has none.
        saved: all parameters that were saved, by name.
    """
    if name in saved:
        return states.get(name), [name] * (name in states)
    if stacked := expert_names(name, saved):
        parts = [part for expert in stacked for part in expert if part in states]
        return (_stacked(stacked, states) if parts else None), parts
    if found := _EXPERT.fullmatch(name):
        module, expert, part = found.groups()
        for leaf, spellings in EXPERT_PARTS.items():
            for spelling in spellings:
                if part in spelling and (whole := f"{module}.{leaf}") in states:
                    place = int(expert), spelling.index(part), len(spelling)
                    return _taken_out(states[whole], *place), [whole]
    return None, []


def _stacked(names: Sequence[Sequence[str]], states: Mapping[str, State]) -> State:
    """Put the states of single experts into one, as their weights are: the parts of each one above the other.

    An expert that no token has reached yet has none: its rows are zeros, as they would be in a stack.
    """
    import torch

    places = range(len(names[0]))
    models = [next((states[expert[place]] for expert in names if expert[place] in states), {}) for place in places]
    found: State = {}
    for key, value in models[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            rows = [
                [
                    states[name][key] if name in states else torch.zeros_like(models[place][key])
                    for place, name in enumerate(expert)
                ]
                for expert in names
            ]
            found[key] = torch.stack([torch.cat(parts) for parts in rows])
        else:  # the number of steps
            found[key] = max((states[part][key] for expert in names for part in expert if part in states), key=float)
    return found


def _taken_out(state: State, expert: int, part: int, parts: int) -> State:
    import torch

    return {
        key: value[expert].chunk(parts)[part].clone() if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for key, value in state.items()
    }
