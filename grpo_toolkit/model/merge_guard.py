"""The base under an adapter, as it was, through every merge into it and out of it.

TRL (and ms-swift) send a LoRA policy to vLLM by `merge_adapter`, reading the weights, and `unmerge_adapter`: in the
live base, at every step. Adding a matrix to bfloat16 weights and subtracting it again rounds twice, so the base drifts
away from its files: 1.1% of the mean |w| after one such pair, 28% after a hundred. The adapter is trained for the
drifted base, and with the clean one it is another policy (https://github.com/huggingface/trl/issues/6688). TRL merges
inside a generator, too: if its consumer fails, nothing unmerges, and a merged adapter gets no gradient.

So the two methods are wrapped on the instance. What a merge is about to change is copied before it and put back, bit
for bit, after the unmerge, after a merge that failed, and before the next training forward or merge where an unmerge
never came. The copy lives for that long only: whatever else changes the base between two merges is left alone.

Guarded are LoRA's variants on plain, tied and quantised layers (whose merge replaces the parameter); under FSDP2 each
rank keeps its own shard. ZeRO-3 needs no copy: it drops what was written into gathered weights when they are shared
out again. FSDP1 cannot merge at all. Where there is no room for a copy, a part of each weight is remembered instead,
and the drift is measured and reported.
"""

from __future__ import annotations

import logging
import os
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

logger = logging.getLogger(__name__)

_GUARD: Final = "_grpo_toolkit_merge_guard"
_HEADROOM: Final = 1.25
_REMEMBERED: Final = 4096
"""The elements of each weight that are remembered where there is no room for all."""

_Place = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A weight of a base layer before a merge.

    Attributes:
        module, name: its place.
        parameter: what lay there.
        copied: what this process held of it.
        state: a bitsandbytes layer's record of its 8-bit weight, which a merge renews.
    """

    module: Any
    name: str
    parameter: torch.nn.Parameter
    copied: torch.Tensor
    state: dict[str, Any]

    def put_back(self) -> None:
        is_replaced = self.module._parameters.get(self.name) is not self.parameter
        if is_replaced and not hasattr(self.parameter, "device_mesh"):  # FSDP2 swaps its own, and swaps them back
            setattr(self.module, self.name, self.parameter)
        if self.state:
            vars(self.module.state).update(self.state)
        live = _held(self.parameter)
        if live.shape == self.copied.shape and live.dtype == self.copied.dtype:
            live.copy_(self.copied)
        else:
            self.parameter.data = self.copied.to(live.device)


@dataclass(kw_only=True)
class MergeGuard:
    """The guard of one PEFT model's base.

    Attributes:
        model: the PEFT model.
        merge, unmerge: its tuner's own methods.
        where: the device of the copies, or None where there was no room for them.
        drift: mean |change| of the base over its mean |w|, where it could not be put back.
    """

    model: Any
    merge: Callable[..., None]
    unmerge: Callable[[], None]
    where: str | None = None
    drift: float = 0.0
    _kept: dict[_Place, _Weight] = field(default_factory=dict)
    _remembered: dict[_Place, torch.Tensor] = field(default_factory=dict)
    _watch: LookingHooks | None = None
    _said: set[str] = field(default_factory=set)

    def merge_and_keep(self, *args: Any, **kwargs: Any) -> None:
        """Do the model's own `merge_adapter`, having copied what it changes."""
        with self._surviving("keeping the base"):
            self._before(*args, **kwargs)
        try:
            self.merge(*args, **kwargs)
        except BaseException:
            with self._surviving("putting the base back"):
                self._take_out()
            raise
        with self._surviving("keeping the base"):
            merged = {place for layer in self._merged() for place, *_ in _weights_of(layer)}
            self._kept = {place: weight for place, weight in self._kept.items() if place in merged}
            if self._watch is None:
                self._watch = LookingHooks("guarding the base")
                self._watch.before(self.model, self._before_forward)

    def unmerge_and_put_back(self) -> None:
        """Do the model's own `unmerge_adapter`, and put the base back over what that computed."""
        try:
            self.unmerge()
        finally:
            with self._surviving("putting the base back"):
                self._put_back()

    def check(self) -> None:
        """Take out an adapter that is still merged, and raise if the base is not as it was.

        Raises:
            UnsupportedError: with the drift.
        """
        if self._watch is not None:
            self._take_out_abandoned()
        if self.drift:
            raise UnsupportedError(f"{self._drifted()}; with the clean base its adapter is another policy")

    def _before(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        wanted = set(adapter_names or self.model.active_adapters)
        if self._watch is not None and all(wanted <= set(layer.merged_adapters) for layer in self._merged()):
            self._take_out_abandoned()
        layers = [layer for layer in _layers(self.model) if not layer.merged]
        found = {place: rest for layer in layers for place, *rest in _weights_of(layer) if place not in self._kept}
        if not found:
            return
        size = sum(_held(parameter).nbytes for *_, parameter in found.values())
        self.where = _room(size, next(iter(found.values()))[-1])
        for place, (module, name, parameter) in found.items():
            if self.where is None:
                self._remembered.setdefault(place, _part(parameter).clone())
                continue
            state = vars(getattr(module, "state", types.SimpleNamespace()))
            self._kept[place] = _Weight(
                module=module,
                name=name,
                parameter=parameter,
                copied=_held(parameter).to(self.where, copy=True),
                state=dict(state) if "SCB" in state else {},
            )
        if self.where is not None:
            self._say_once(
                "kept",
                "the adapter is merged into the live base, for vLLM it seems, and taken out again by subtraction, "
                "which rounds: the base would drift away from its files "
                "(https://github.com/huggingface/trl/issues/6688). Its merged layers "
                f"({size / 1e6:,.1f} MB) are copied to {self.where} for the while, and put back bit for bit "
                "after each merge",
            )

    def _before_forward(self, model: Any, args: Any, kwargs: Any) -> None:
        import torch

        if model.training and torch.is_grad_enabled():
            self._take_out_abandoned()

    def _take_out_abandoned(self) -> None:
        self._take_out()
        self._say_once(
            "abandoned",
            "the adapter was merged into the base and not taken out again (was sending its weights broken off?); it "
            "would have got no gradient. It is out now, and the base is as it was",
        )

    def _take_out(self) -> None:
        """Undo a merge that nobody unmerged."""
        for layer in self._merged():
            parameters = list(layer.get_base_layer().parameters(recurse=False))
            if all(hasattr(one, "ds_id") for one in parameters) or any(
                place in self._kept for place, *_ in _weights_of(layer)
            ):
                layer.merged_adapters.clear()
        if self._merged():  # not kept
            self.unmerge()
        self._put_back()

    def _put_back(self) -> None:
        import torch

        with torch.no_grad():
            for weight in self._kept.values():
                weight.put_back()
            self._kept = {}
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            if self._remembered:
                self._measure()

    def _measure(self) -> None:
        changed = total = 0.0
        for layer in _layers(self.model):
            for place, *_, parameter in _weights_of(layer):
                if place in self._remembered:
                    before = self._remembered[place].float()
                    changed += float((_part(parameter).float() - before).abs().sum())
                    total += float(before.abs().sum())
        self.drift = changed / total if total else 0.0
        if self.drift:
            self._say_once("drift", f"{self._drifted()}; leave room for a copy of them, or load the base in float32")

    def _drifted(self) -> str:
        return (
            f"the base has drifted by {self.drift:.2%} of its mean |w|, because the adapter is merged into it and "
            "taken out again by subtraction, and there was no memory for a copy of its merged layers"
        )

    def _merged(self) -> list[Any]:
        return [layer for layer in _layers(self.model) if layer.merged]

    @contextmanager
    def _surviving(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # training must go on, at worst with a base that drifts
            self._say_once(purpose, f"{purpose} as it was failed ({type(error).__name__}: {error})")

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("grpo_toolkit: %s", message)


def guard_merges(model: Any) -> MergeGuard | None:
    """Keep a PEFT model's base as it is through every later `merge_adapter` and `unmerge_adapter`.

    Returns:
        The guard, the same one if the model has it already; None for a model without an adapter that can be merged.
    """
    while hasattr(model, "module") and not hasattr(model, "peft_config"):
        model = model.module
    tuner: Any = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or not hasattr(type(tuner), "merge_adapter"):
        return None
    if _GUARD not in vars(tuner):
        guard = MergeGuard(model=model, merge=tuner.merge_adapter, unmerge=tuner.unmerge_adapter)
        vars(tuner)[_GUARD] = guard
        tuner.merge_adapter = types.MethodType(merge_adapter, tuner)
        tuner.unmerge_adapter = types.MethodType(unmerge_adapter, tuner)
    found: MergeGuard = vars(tuner)[_GUARD]
    return found


# Bound to the instance, as the save hook is: a deep copy gets its own, and a pickled model finds the plain methods.
def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
    """Do the tuner's `merge_adapter` under its guard."""
    vars(self)[_GUARD].merge_and_keep(*args, **kwargs)


def unmerge_adapter(self: Any) -> None:
    """Do the tuner's `unmerge_adapter` under its guard."""
    vars(self)[_GUARD].unmerge_and_put_back()


def _layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _weights_of(layer: Any) -> Iterator[tuple[_Place, Any, str, torch.nn.Parameter]]:
    """Yield what a merge of a layer writes to: each parameter with its place, where this process holds any of it."""
    base = layer.get_base_layer()
    for name, parameter in base._parameters.items():
        if parameter is not None and not hasattr(parameter, "ds_id") and parameter.numel():
            yield (id(base), name), base, name, parameter


def _held(parameter: Any) -> torch.Tensor:
    """Return what this process holds of a parameter: FSDP2's shard, or all."""
    data = parameter.data
    held: torch.Tensor = data.to_local() if hasattr(data, "to_local") else data
    return held


def _part(parameter: torch.nn.Parameter) -> torch.Tensor:
    elements = _held(parameter).reshape(-1)
    return elements[:: max(1, elements.numel() // _REMEMBERED)]


def _room(size: int, parameter: torch.nn.Parameter) -> str | None:
    """Return where there is room for copies: beside the weights, or on the CPU, shared by this machine's ranks."""
    device = str(_held(parameter).device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for place, needed in ((device, _HEADROOM * size), ("cpu", _HEADROOM * size * ranks)):
        free = free_bytes(place)
        if free is not None and needed < free:
            return place
    return None
