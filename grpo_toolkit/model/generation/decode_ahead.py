"""A `generate` that does not keep a GPU waiting: the next step is queued before the last token is looked at.

Between two tokens `generate` asks the GPU whether every sequence has ended, which waits until the GPU has nothing left
to do; then the GPU waits while Python prepares the next step: 1.4 of 5.5 ms a token of a compiled Qwen2.5-VL-3B on an
H200 (docs/benchmarks/latency.md). transformers can ask one step late (`DeferredStopCheck`, in 5.17 and 5.23) and does
so on Apple's GPUs alone. And transformers 5 makes a new static cache for every request, where 4.x kept one: a CUDA
graph is recorded for the addresses of one cache, and for those of the next again.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.attention.grouped_decode import grouped_decoding
from grpo_toolkit.model.attention.packed_vision import packed_vision
from grpo_toolkit.model.cache_probe import cache_in
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DEVICES: Final = ("cuda",)
"""The devices on which it is worth while: a CPU has done what it was told before it is asked."""

_MAKE: Final = "_prepare_static_cache"  # of transformers 5; 4.x keeps its cache by itself
_KEPT: Final = ("keys", "values", "cumulative_length")  # what a static layer marks as having a fixed address

SLOTS: Final = 8
"""The length of a static cache is a multiple of it, since tensor cores read 16 bytes at a time. A decode step of 64
sequences over 1,167 slots took 9.4 ms on an H200, 5.3 of it in two kernels for matrices without alignment."""

_defers: ContextVar[bool] = ContextVar("grpo_toolkit_defers", default=False)


class DecodeAhead:
    """A model's `generate`, faster on a GPU where a step is compiled: stops are checked late, the cache is kept.

        ahead = DecodeAhead(model)
        ahead.generate(**inputs, do_sample=False, cache_implementation="static")

    The tokens are those of `model.generate`. One forward more runs after an end of sequence, which a logits processor
    sees too, and a streamer is handed a token while the next one is being computed. Stops are checked as ever without
    a KV cache, where a cache is returned that cannot forget a token (before 5.24, any), and on devices other than the
    current GPU.

    The memory of a static cache is kept for the next request, which gets it if it needs the same shapes in the same
    dtype. Not kept: a cache that is returned (`return_dict_in_generate`), which is the caller's, one that is offloaded
    or was filled in chunks, that of an encoder-decoder or of linear attention, that of a request that failed, and of
    a request that is made while another one runs.

    Args:
        model: a model with `generate`, or an adapter on one.
        max_cache_len: length of the static cache in tokens, prompt and answer together, for requests of any length up
            to it: a compiled step is then compiled once, and not again for the second length, with a CUDA graph for
            each. Every step's attention runs over all of it, in later requests to the model itself, too. None makes it
            as long as the longest request so far, as transformers does, and up to seven tokens longer.
        grouped: whether decode steps run `grouped_decode` attention in place of SDPA, which repeats keys and values
            for every query head where there is a mask. With 5.24 and later; the logits differ by rounding.
        packed_vision: whether a vision tower makes one attention call a layer and encodes each distinct image of a
            request once; the logits differ by rounding.
    """

    def __init__(
        self, model: Any, *, max_cache_len: int | None = None, grouped: bool = False, packed_vision: bool = False
    ) -> None:
        self.model = model
        self.max_cache_len = max_cache_len
        self.grouped = grouped
        self.packed_vision = packed_vision
        self._layers: list[Any] = []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `model.generate` does."""
        attention: Any = grouped_decoding(self.model) if self.grouped else nullcontext()
        vision: Any = packed_vision(self.model) if self.packed_vision else nullcontext()
        with attention, vision, deferred_stops(), self._lending() as made:
            output = self.model.generate(*args, **kwargs)
        for cache, layers in made:
            if cache_in(output) is not cache:
                self._layers = layers
        return output

    @contextmanager
    def _lending(self) -> Iterator[list[tuple[Any, list[Any]]]]:
        """Give the first cache that `generate` makes the last request's memory; yields it with its layers."""
        inner: Any = base_model(self.model)
        made: list[tuple[Any, list[Any]]] = []
        if not hasattr(inner, _MAKE) or _MAKE in vars(inner):  # in vars: by a request around this one
            yield made
            return
        make, thread = getattr(inner, _MAKE), get_ident()

        def lend(*args: Any, **kwargs: Any) -> Any:
            if "max_cache_len" in kwargs:
                longest = max(kwargs["max_cache_len"], self.max_cache_len or 0)
                kwargs["max_cache_len"] = -(-longest // SLOTS) * SLOTS
            cache = make(*args, **kwargs)
            if not made and get_ident() == thread:
                layers, before, self._layers = _lasting(cache), self._layers, []
                made.append((cache, layers))
                for layer, old in zip(layers, before, strict=False):
                    layer.lazy_initialization = partial(_initialize, layer, old)
            return cache

        setattr(inner, _MAKE, lend)
        try:
            yield made
        finally:
            vars(inner).pop(_MAKE, None)  # the class's own shows again
            for layer in (layer for _, layers in made for layer in layers):
                vars(layer).pop("lazy_initialization", None)  # of a prefill that failed: it would hold the old layer


def _lasting(cache: Any) -> list[Any]:
    """Return its layers whose tensors stay where they are, and which the prefill will make."""
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    layers = [] if getattr(cache, "offloading", False) else getattr(cache, "layers", [])
    kinds = (StaticLayer, StaticSlidingWindowLayer)
    return [layer for layer in layers if type(layer) in kinds and not layer.is_initialized]


def _initialize(layer: Any, old: Any, *states: Any) -> None:
    """Set up an empty layer as the prefill does, then put the old layer's tensors in place of equal new ones."""
    import torch

    del layer.lazy_initialization  # as above
    layer.lazy_initialization(*states)
    if torch.compiler.is_compiling():
        return
    for name in _KEPT:
        new, kept = getattr(layer, name, None), getattr(old, name, None)
        if new is not None and kept is not None and _kind(new) == _kind(kept):
            setattr(layer, name, kept.zero_())
            torch._dynamo.mark_static_address(kept)  # beam search leaves tensors that are not marked


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_inference()


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
    """Put our check in front of the library's; where nobody has asked for `deferred_stops` it answers the same."""
    from transformers.generation import utils

    check = getattr(utils, "DeferredStopCheck", None)
    if check is None or hasattr(check.is_supported, "by_grpo_toolkit"):
        return
    library = check.is_supported

    def is_supported(device: torch.device, cache: Any, *args: Any, **kwargs: Any) -> bool:
        import torch

        if _defers.get() and cache is not None and device.type in DEVICES and _is_current(device):
            device = torch.device("mps")  # the one device for which the library considers it
        return bool(library(device, cache, *args, **kwargs))

    is_supported.by_grpo_toolkit = True  # type: ignore[attr-defined]
    check.is_supported = staticmethod(is_supported)


def _is_current(device: torch.device) -> bool:
    """Return whether the library waits for this device: an event of any is recorded on the current one's stream.

    https://github.com/pytorch/pytorch/blob/main/torch/csrc/Event.cpp (THPEvent_record)
    """
    import torch

    return device.index is None or device.index == torch.cuda.current_device()
