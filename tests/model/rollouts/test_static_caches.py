"""Static caches of rollouts: few lengths, fixed addresses, one memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.model.rollouts.static_caches import StaticCaches, bucketed, supports

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)


def config(**changes: Any) -> Any:
    from transformers import Qwen2Config

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2Config(hidden_size=16, num_hidden_layers=2, max_window_layers=1, **heads, **changes)


def prefilled(rows: int, length: int) -> Any:
    """A cache whose values are 100 * row + position."""
    from transformers import DynamicCache

    cache = DynamicCache()
    values = 100.0 * torch.arange(rows)[:, None] + torch.arange(length) + 1
    states = values[:, None, :, None].expand(rows, 1, length, 8)
    for layer in range(2):
        cache.update(states, -states, layer)
    return cache


def test_lengths_come_in_buckets() -> None:
    lengths = [bucketed(tokens) for tokens in (1, 256, 257, 500, 513, 1168, 2000)]
    assert lengths == [256, 256, 384, 512, 768, 1536, 2048]


def test_rows_are_those_of_the_prefill_by_index_and_the_rest_is_empty() -> None:
    caches = StaticCaches(config())
    first = caches.filled(prefilled(2, 40), torch.tensor([1, 0, 1]), 60)
    first.layers[0].keys[:, :, 45:] = torch.nan  # what a diverged training left
    cache = caches.filled(prefilled(2, 3), torch.tensor([1, 0, 1]), 60)
    assert cache is first
    assert cache.layers[1].keys.shape == (3, 1, 256, 8)
    assert cache.layers[0].keys[:, 0, :4, 0].tolist() == [[101, 102, 103, 0], [1, 2, 3, 0], [101, 102, 103, 0]]
    assert cache.layers[0].values[1, 0, :4, 0].tolist() == [-1, -2, -3, 0]
    assert cache.layers[0].keys.isfinite().all()
    assert int(cache.get_seq_length()) == 3


def test_caches_of_all_shapes_share_one_memory() -> None:
    caches = StaticCaches(config())
    long = caches.filled(prefilled(1, 3), torch.zeros(4, dtype=torch.int64), 300)
    short = caches.filled(prefilled(1, 3), torch.zeros(4, dtype=torch.int64), 100)
    fewer = caches.filled(prefilled(1, 3), torch.zeros(2, dtype=torch.int64), 300)
    places = {cache.layers[0].keys.data_ptr() for cache in (long, short, fewer)}
    assert len(places) == 1
    assert len({id(cache) for cache in (long, short, fewer)}) == 3
    assert caches.filled(prefilled(1, 3), torch.zeros(4, dtype=torch.int64), 300) is long
    longer = caches.filled(prefilled(1, 3), torch.zeros(4, dtype=torch.int64), 600)
    assert longer.layers[0].keys.shape[2] == 768
    again = caches.filled(prefilled(1, 3), torch.zeros(4, dtype=torch.int64), 300)
    assert again is not long
    assert again.layers[0].keys.data_ptr() == longer.layers[0].keys.data_ptr()


def test_generate_does_not_take_it_for_a_callers_cache() -> None:
    """For a caller's cache it would take back a token in each layer at each step that is checked late."""
    cache = StaticCaches(config()).filled(prefilled(1, 3), torch.zeros(1, dtype=torch.int64), 8)
    cache._is_user_defined = True
    assert cache._is_user_defined is False


def test_layers_that_are_no_plain_keys_and_values_are_refused() -> None:
    from types import SimpleNamespace

    from transformers import Qwen3NextConfig

    layers = ["linear_attention", "full_attention"]
    linear = Qwen3NextConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, layer_types=layers)
    assert supports(SimpleNamespace(config=config()))
    assert supports(SimpleNamespace(config=config(use_sliding_window=True, sliding_window=8)))
    assert not supports(SimpleNamespace(config=linear))
