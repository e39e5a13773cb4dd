"""`generate` that does not keep a GPU waiting: the next step is queued before the last token is looked at.

Between two tokens `generate` asks the GPU whether every sequence has ended, which waits until the GPU has nothing left
to do; then the GPU waits while Python prepares the next step: 1.4 of 5.5 ms a token of a compiled Qwen2.5-VL-3B on an
H200 (scripts/BENCHMARKS.md). transformers can ask one step late (`DeferredStopCheck`, in 5.17 and 5.23) and does so on
Apple's GPUs alone. And transformers 5 makes a new static cache for every request, where 4.x kept one: a CUDA graph is
recorded for the addresses of one cache, and for those of the next again.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cache import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DEVICES: Final = ("cuda",)
"""Where it is worth while: a CPU has done what it was told before it is asked."""

_defers: ContextVar[bool] = ContextVar("grpo_toolkit_defers", default=False)


class DecodeAhead:
    """A model's `generate`, faster on a GPU where a step is compiled: stops are checked late, the cache is kept.

        ahead = DecodeAhead(model)
        ahead.generate(**inputs, do_sample=False, cache_implementation="static")

    The tokens are those of `model.generate`. One forward more runs after an end of sequence, and a streamer is handed
    a token while the next one is being computed. The static cache is kept from request to request while the batch size
    is the same and the answer fits; one that is returned (`return_dict_in_generate`) is overwritten by the next
    request. One request at a time: threads need a model each. On a CPU stops are checked as ever.

    Args:
        model: a model with `generate`, or an adapter on one.
        max_cache_len: length of the static cache in tokens, prompt and answer together, for requests of any length up
            to it: a compiled step is then compiled once, and not again for the second length, with a CUDA graph for
            each. Every step's attention runs over all of it. None makes it as long as the longest request so far.
    """

    def __init__(self, model: Any, *, max_cache_len: int | None = None) -> None:
        self.model = model
        self.max_cache_len = max_cache_len
        self._cache: Any = None
        self._made_for: tuple[dict[str, Any], int] = ({}, 0)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `model.generate`."""
        with deferred_stops(), self._keeping():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        inner: Any = base_model(self.model)
        make = getattr(inner, "_prepare_static_cache", None)  # transformers 5; 4.x keeps its cache by itself
        if make is None:
            yield
            return
        inner._prepare_static_cache = partial(self._kept, make)
        try:
            yield
        finally:
            del inner._prepare_static_cache  # the class's own shows again

    def _kept(self, make: Any, *args: Any, **kwargs: Any) -> Any:
        """The cache of the last request, emptied, if it serves; else a new one."""
        bound = inspect.signature(make).bind(*args, **kwargs)
        length = bound.arguments["max_cache_len"] = max(bound.arguments["max_cache_len"], self.max_cache_len or 0)
        inner = base_model(self.model)
        wanted = {**bound.arguments, "device": inner.device, "dtype": inner.dtype}
        del wanted["max_cache_len"], wanted["model_kwargs"]
        made_for, held = self._made_for
        if wanted == made_for and length <= held and _can_be_emptied(self._cache):
            self._cache.reset()
            return self._cache
        self._cache = None  # freed before another one is made
        self._cache, self._made_for = make(*bound.args, **bound.kwargs), (wanted, length)
        return self._cache


def _can_be_emptied(cache: Any) -> bool:
    """Not one that no prefill has filled yet, nor one that lives in inference mode alone."""
    import torch

    layers = getattr(cache, "layers", None)
    if not layers or not cache.is_initialized:
        return False
    return torch.is_inference_mode_enabled() or not any(layer.keys.is_inference() for layer in layers)


@contextmanager
def deferred_stops() -> Iterator[None]:
    """Let `generate` of this thread ask a step late whether it is done, on the devices where asking waits."""
    _install()
    token = _defers.set(True)
    try:
        yield
    finally:
        _defers.reset(token)


def _install() -> None:
    """Put our word in front of the library's; where nobody has asked for `deferred_stops` it says what that says."""
    from transformers.generation import utils

    check = getattr(utils, "DeferredStopCheck", None)
    if check is None or hasattr(check.is_supported, "by_grpo_toolkit"):
        return
    library = check.is_supported

    def is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
        import torch

        if _defers.get() and device.type in DEVICES:
            device = torch.device("mps")  # the one device for which the library considers it
        return bool(library(device, *args, **kwargs))

    is_supported.by_grpo_toolkit = True  # type: ignore[attr-defined]
    check.is_supported = staticmethod(is_supported)
