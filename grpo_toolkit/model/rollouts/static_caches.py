"""Static KV caches that rollouts share: CUDA graphs are recorded for the addresses of one cache.

A compiled step is compiled for one batch size and one length, so lengths come in buckets, and a length follows from
the rollout alone: a resumed training gets the same kernels. Caches of all shapes are views into one memory. Attention
runs over every slot of a cache, which is why a short rollout does not get a long one's.
"""

from __future__ import annotations

from functools import cache as once
from math import prod
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

SHORTEST: Final = 256
"""Tokens that the shortest cache holds."""


def bucketed(tokens: int) -> int:
    """Return the length of the cache for so many tokens, prompt and completion together.

    Lengths are powers of two and those halfway between: prompts of a data set whose lengths differ by half then share
    one compiled step or two. A compilation takes half a minute; a step over twice the slots, tenths of a millisecond.
    """
    length = SHORTEST
    while length < tokens:
        is_power = length & (length - 1) == 0
        length = length * 3 // 2 if is_power else length * 4 // 3
    return length


class StaticCaches:
    """A store of caches by batch size and length, filled from that of a prefill.

    Args:
        config: the model's.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._memory: dict[tuple[int, str], torch.Tensor] = {}
        self._made: dict[tuple[int, int], Any] = {}

    def filled(self, prefilled: Any, index: torch.Tensor, tokens: int) -> Any:
        """Return a static cache with the rows of a prefill.

        Args:
            prefilled: a DynamicCache of the distinct rows.
            index: for each row, which of the distinct ones it is. [batch]
            tokens: what the cache must hold at the end, a row.
        """
        rows, length = int(index.shape[0]), bucketed(tokens)
        if (rows, length) not in self._made:
            self._made[rows, length] = self._make(prefilled, rows, length)
        cache = self._made[rows, length]
        for layer, source in zip(cache.layers, prefilled.layers, strict=True):
            _fill(layer, source, index, prefilled.get_seq_length())
        return cache

    def _make(self, prefilled: Any, rows: int, length: int) -> Any:
        import torch

        cache = _kept_cache()(config=self._config, max_cache_len=length)
        for number, (layer, source) in enumerate(zip(cache.layers, prefilled.layers, strict=True)):
            states = [one.new_empty((rows, one.shape[1], 0, one.shape[3])) for one in (source.keys, source.values)]
            layer.lazy_initialization(*states)
            for name in ("keys", "values"):
                shape = getattr(layer, name).shape
                setattr(layer, name, self._lent(number, name, getattr(layer, name))[: prod(shape)].view(shape))
                torch._dynamo.mark_static_address(getattr(layer, name))
        return cache

    def _lent(self, number: int, name: str, wanted: torch.Tensor) -> torch.Tensor:
        """Return the memory of a layer; if it is too small, a larger one replaces it, and all caches are dropped."""
        memory = self._memory.get((number, name))
        if memory is None or memory.numel() < wanted.numel() or memory.dtype != wanted.dtype:
            self._made.clear()
            memory = self._memory[number, name] = wanted.flatten()
        return memory


def supports(model: Any) -> bool:
    """Return whether all layers of a model's static cache are of the two kinds that are filled here."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    layers = StaticCache(config=model.config, max_cache_len=SHORTEST).layers
    return all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers)


@once
def _kept_cache() -> Any:
    """Make the class of a cache that stays ours when `generate` is handed it.

    `generate` marks a cache from outside, and would take back a token in every layer of it when stops are checked
    late: 36 kernels a step, for a cache that is emptied before it is used again.
    """
    from transformers import StaticCache

    class KeptCache(StaticCache):  # type: ignore[misc]
        @property
        def _is_user_defined(self) -> bool:
            return False

        @_is_user_defined.setter
        def _is_user_defined(self, value: bool) -> None: ...

    return KeptCache


def _fill(layer: Any, source: Any, index: torch.Tensor, length: int) -> None:
    """Put rows of a prefilled layer into a static one, whose tensors stay where they are."""
    held, slots = source.keys.shape[2], layer.max_cache_len
    # A sliding window keeps its last tokens but one: the next takes the first slot's place.
    first = 0 if length < slots or not layer.is_sliding else slots - held
    for name in ("keys", "values"):
        target = getattr(layer, name)
        # An unfilled slot has no weight, and no weight times what is not finite is not finite.
        target[:, :, :first].zero_()
        target[:, :, first + held :].zero_()
        target[:, :, first : first + held].copy_(getattr(source, name).index_select(0, index.to(target.device)))
    layer.cumulative_length.fill_(min(length, slots))
    if layer.is_sliding:
        layer.cumulative_length_int = length
