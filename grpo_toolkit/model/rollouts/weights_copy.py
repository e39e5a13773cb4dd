"""A second set of modules for rollouts, whose weights need no casting and wear no adapter.

Where the live weights are float32 under autocast, every decode step casts all of them again: 99 ms a step in place of
36 for a Qwen2.5-VL-3B on an H200. Where they wear an adapter, every layer does three small matrix products in place of
one, through wrappers that torch.compile cannot see through. The copy casts and folds once after each optimizer step.
What needs neither is not copied: the second module holds the live tensor itself. Weights that are sharded over
several processes are gathered into the copy, tensor by tensor, once after each optimizer step.

The modules are the copy's own in any case. So the training's hooks, its checkpointing, its train mode and the state
that a model keeps between prefill and decode (`rope_deltas`) stay out of a compiled forward, and the rollouts' out of
the training.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.model.attention.grouped_decode import NAME, register
from grpo_toolkit.model.kv_cache import cache_flags, set_cache_flags
from grpo_toolkit.model.live_model import base_model, config_levels, random_state_kept
from grpo_toolkit.model.sharding.gather import is_sharded, own_part, unsharded, unsharded_models, whole_shape
from grpo_toolkit.model.sharding.ranks import failing_together

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


def why_no_copy(model: torch.nn.Module) -> str | None:
    """Return what of a model cannot be copied or shared, in a few words; None where everything can."""
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return "the adapter is made of virtual tokens"
    is_quantised = getattr(base_model(model), "hf_quantizer", None) is not None
    if is_quantised or not all(parameter.is_floating_point() for parameter in model.parameters()):
        return "the base is quantised"
    for module in model.modules():
        if _is_adapter(module) and not _is_plain_lora(module):
            return f"the adapter has a {type(module).__module__.rpartition('.')[2]}.{type(module).__name__} layer"
        if _is_replacement(module) and not hasattr(module, "modules_to_save"):
            return f"the adapter has a {type(module).__name__}"
    devices = {parameter.device for parameter in model.parameters()}
    return f"the weights lie on {len(devices)} devices" if len(devices) > 1 else None


def drops_out(model: torch.nn.Module) -> bool:
    """Return whether an adapter has dropout, which the copy has not."""
    return any(getattr(drop, "p", 0) > 0 for m in model.modules() for drop in getattr(m, "lora_dropout", {}).values())


def is_switched_off(model: torch.nn.Module) -> bool:
    """Return whether an adapter is disabled for now, so that the base alone is asked."""
    return any(bool(module.disable_adapters) for module in model.modules() if _is_adapter(module))


class WeightsCopy:
    """The modules of a live model once more, in evaluation mode, for `generate` alone.

        copy = WeightsCopy(model, dtype=torch.bfloat16)
        copy.refresh()
        copy.model.generate(...)

    Args:
        live: the transformers model inside all wrappers, with an adapter's layers in it.
        dtype: what the live model's float32 tensors are computed in; None leaves them in float32.

    Attributes:
        model: the second set of modules.
        refreshed: how often weights were copied.

    Raises:
        UnsupportedError: the model's class, built from its config, has other tensors than the live model.
    """

    def __init__(self, live: Any, *, dtype: torch.dtype | None) -> None:
        self.live = live
        self.dtype = dtype
        self._is_gathered = is_sharded(live)
        self.refreshed = 0
        self._seen: list[Any] = []
        self.model: Any = self._build()

    @property
    def is_stale(self) -> bool:
        """True where live weights were written to in place, or are others, since they were copied."""
        return [source.state() for source in self._sources().values()] != self._seen

    def refresh(self, *, is_dirty: bool = True) -> None:
        """Copy the live weights in place, if they are dirty or stale; collective where they are sharded.

        The live model's generation config is taken over every time.
        """
        import torch

        self.model.generation_config = copy.deepcopy(self.live.generation_config)
        self.model.generation_config.update(use_cache=True, cache_implementation=None)
        if not is_dirty and not self.is_stale:
            return
        sources = self._sources()
        state = [source.state() for source in sources.values()]
        self._make_room(sources)
        with torch.no_grad():
            done: dict[Any, torch.nn.Parameter] = {}
            for name, source in sources.items():
                parameters, key = self._place_of(name)
                if source.key not in done:
                    done[source.key] = self._written(parameters[key], source, name)
                parameters[key] = done[source.key]  # tied where the live ones are
            for name, buffer in self.model.named_buffers():
                buffer.copy_(_source(self.live, name).tensor)
        self._seen = state
        self.refreshed += 1

    def _sources(self) -> dict[str, _Source]:
        return {name: _source(self.live, name) for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def _make_room(self, sources: Mapping[str, _Source]) -> None:
        """Allocate what sharded weights are gathered into: a rank without room must not leave the others in a gather.

        Raises:
            PeerError: another rank has no room.
        """
        import torch

        if not self._is_gathered:
            return
        places = {name: self._place_of(name) for name in sources}
        missing = [name for name, (parameters, key) in places.items() if parameters[key].is_meta]
        if not missing:
            return
        made: dict[Any, torch.nn.Parameter] = {}
        with failing_together():
            for name in missing:
                source = sources[name]
                if source.key not in made:
                    made[source.key] = torch.nn.Parameter(self._empty(source, name), requires_grad=False)
        for name in missing:
            parameters, key = places[name]
            parameters[key] = made[sources[name].key]

    def _place_of(self, name: str) -> tuple[dict[str, Any], str]:
        """Return the parameters of the copy's module that has one of this name, and its key among them."""
        owner, _, key = name.rpartition(".")
        return self.model.get_submodule(owner)._parameters, key

    def _empty(self, source: _Source, name: str) -> torch.Tensor:
        import torch

        live = source.tensor.detach()
        return torch.empty(whole_shape(source.tensor), dtype=self._dtype_of(live, name), device=live.device)

    def _written(self, parameter: Any, source: _Source, name: str) -> torch.nn.Parameter:
        """Return the copy's parameter, which is the live tensor itself or has its value."""
        import torch

        live = source.tensor.detach()
        dtype = self._dtype_of(live, name)
        if dtype == live.dtype and not source.adapters and not self._is_gathered:
            if parameter.is_meta or parameter.data_ptr() != live.data_ptr():
                return torch.nn.Parameter(live, requires_grad=False)
            return parameter  # type: ignore[no-any-return]
        has_storage = not parameter.is_meta and parameter.dtype == dtype
        if has_storage and (self._is_gathered or parameter.data_ptr() != live.data_ptr()):
            source.copy_into(parameter.data)
            return parameter  # type: ignore[no-any-return]
        storage = self._empty(source, name)
        source.copy_into(storage)
        return torch.nn.Parameter(storage, requires_grad=False)

    def _dtype_of(self, live: torch.Tensor, name: str) -> torch.dtype:
        import torch

        kept = getattr(self.live, "_keep_in_fp32_modules_strict", None) or ()
        is_kept = any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept)
        return live.dtype if self.dtype is None or live.dtype != torch.float32 or is_kept else self.dtype

    def _build(self) -> Any:
        """Return modules of the live model's class without weights, and buffers with the live ones' values."""
        import torch

        config = copy.deepcopy(self.live.config)
        set_cache_flags(config, dict.fromkeys(cache_flags(config), True))
        text = config.get_text_config(decoder=True)
        if text._attn_implementation in ("sdpa", "flash_attention_2"):
            register()
            text._attn_implementation = NAME
        for _, nested in config_levels(config):
            if nested is not text and "flash" in (nested._attn_implementation or ""):
                nested._attn_implementation = "sdpa"  # a class asks for a flash kernel's package when it is built
        with torch.device("meta"), random_state_kept(), unsharded_models() if self._is_gathered else nullcontext():
            model = type(self.live)(config)
        model.eval().requires_grad_(False)
        self._take_vision_attention(model, text)
        wanted = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for name, shape in wanted.items():
            try:
                found = whole_shape(_source(self.live, name).tensor)
            except AttributeError:
                found = None
            if found != shape:
                raise UnsupportedError(f"{type(self.live).__name__} built from its config has another {name}")
        for name, module in model.named_modules():
            self._give_buffers(name, module)
        return model

    def _take_vision_attention(self, model: Any, text: Any) -> None:
        """Have the copy's vision tower attend as the live one does, also by an attention set after loading."""
        live_text = self.live.config.get_text_config(decoder=True)
        for name, module in model.named_modules():
            config = getattr(module, "config", None)
            if config is None or config is text or config is model.config:
                continue
            live = getattr(_module(self.live, name), "config", None)
            if live is not None and live is not live_text:
                config._attn_implementation = live._attn_implementation

    def _give_buffers(self, name: str, module: Any) -> None:
        """Give a module the live one's buffers and bare tensors: `to_empty` leaves noise in rotary frequencies."""
        import torch

        live = _module(self.live, name)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = getattr(live, key).detach().clone()
        for key, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, getattr(live, key).detach().clone())


@dataclass(frozen=True)
class _Source:
    """The source of a tensor of the copy: a live tensor, and the adapters that are folded into it."""

    tensor: Any
    adapters: tuple[tuple[Any, str], ...] = ()

    @property
    def key(self) -> tuple[int, ...]:
        return (id(self.tensor), *(id(layer) for layer, _ in self.adapters))

    def state(self) -> tuple[Any, ...]:
        """Return what differs once the live tensors were written to in place, or are others."""
        tensors = (self.tensor, *(t for layer, name in self.adapters for t in _factors(layer, name)))
        parts = [own_part(tensor) for tensor in tensors]
        # No address of a shard: ZeRO-3 gathers a parameter to another one each time.
        addresses = [0 if part is not tensor else part.data_ptr() for part, tensor in zip(parts, tensors, strict=True)]
        return tuple(
            (id(tensor), address, part._version)
            for tensor, address, part in zip(tensors, addresses, parts, strict=True)
        )

    def copy_into(self, storage: torch.Tensor) -> None:
        """Write the whole tensor, the adapters folded in by float32 arithmetic; rounded once, when it is stored."""
        import torch

        with unsharded(self.tensor) as whole:
            total = whole.detach().float() if self.adapters else whole.detach()
            for layer, name in self.adapters:
                with ExitStack() as stack:
                    factors = [stack.enter_context(unsharded(factor)) for factor in _factors(layer, name)]
                    down, up = (factor.detach().float() for factor in factors)
                    total = torch.addmm(total, up, down, alpha=layer.scaling[name])
            storage.copy_(total)


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _source(live: Any, name: str) -> _Source:
    """Find the live tensor of a name in the model without wrappers."""
    owner, _, key = name.rpartition(".")
    *_, module = _path(live, owner)
    if not _is_adapter(module):
        return _Source(getattr(module, key))
    adapters = () if key != "weight" or module.merged else tuple((module, name) for name in _active(module))
    return _Source(getattr(module.get_base_layer(), key), adapters)


def _module(live: Any, name: str) -> Any:
    *_, module = _path(live, name)
    return module.get_base_layer() if _is_adapter(module) else module


def _path(live: Any, name: str) -> Iterator[Any]:
    """Yield the modules on the way to a name, with PEFT's trained replacement in the place of what it replaces."""
    module = live
    yield module
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        if _is_replacement(module):
            active = module.active_adapters
            module = module.modules_to_save[active[0]] if active else module.original_module
        yield module


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_adapter(module: Any) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "base_layer")


def _is_replacement(module: Any) -> bool:
    """Return whether it stands for a module that PEFT trains whole, or a part of."""
    return hasattr(module, "original_module") and hasattr(module, "active_adapters")


def _is_plain_lora(module: Any) -> bool:
    """Return whether the adapter is two matrices on a linear layer, and nothing more."""
    import torch
    from peft.tuners.lora.layer import Linear

    return (
        type(module) is Linear
        and type(module.get_base_layer()) is torch.nn.Linear
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "use_dora", {}).values())
        and not any(getattr(module, "lora_bias", {}).values())
    )
