"""Attention of a decode step that reads each key and value once.

In a decode step each sequence has one query a head, and several query heads share one head of keys and values
(grouped-query attention). With a mask, which a static cache always needs, PyTorch's SDPA has no fast kernel for
grouped heads, and transformers repeats keys and values for every query head instead: eight times for a
Qwen2.5-VL-3B, 22 GB of memory traffic in a step of 64 sequences. Here the query heads of one group become the rows of
one matrix, and two matrix products with the keys and values as they lie in the cache do the work.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

NAME: Final = "grouped_decode"
"""The name under which transformers finds it, as `config._attn_implementation`."""

_FOR_SDPA: Final = ("position_bias", "softcap", "s_aux", "output_attentions")
"""Arguments that ask for more than softmax(q k + mask) v: given any of them, the library's function answers."""


def grouped_decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with one query a sequence over unexpanded keys and values; anything else goes to the library's SDPA.

    The softmax is in float32, as in the library's `eager` attention.

    Args:
        module: the attention layer, which only the library's SDPA looks at.
        query: [batch, query heads, 1, dim]; other lengths go to SDPA.
        key: [batch, key heads, length, dim].
        value: [batch, key heads, length, value dim].
        attention_mask: [batch or 1, 1 or query heads, 1, length or more]: booleans, true where a key is attended to,
            or numbers that are added to the scores.
        dropout: of the attention weights; other than zero goes to SDPA.
        scaling: of the scores, 1 / sqrt(dim) by default.

    Returns:
        [batch, 1, query heads, value dim], and None in place of the attention weights.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, queries, dim = query.shape
    groups = key.shape[1]
    asks_for_more = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _FOR_SDPA)
    if queries != 1 or dropout or heads % groups or asks_for_more:
        output: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    grouped = query.reshape(batch, groups, heads // groups, dim)
    scores = torch.matmul(grouped, key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        if mask.shape[1] != 1:
            mask = mask.reshape(mask.shape[0], groups, heads // groups, mask.shape[-1])
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    attended = torch.matmul(weights, value)
    return attended.reshape(batch, 1, heads, value.shape[-1]), None


def register() -> None:
    """Make `grouped_decode` a name that transformers knows, with the masks that SDPA gets.

    Without a mask function of that name the library makes no mask, and padding would be attended to.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, grouped_decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped_decoding(model: torch.nn.Module) -> Iterator[None]:
    """Decode with grouped attention inside, where the language model runs on SDPA; its config is put back on exit.

    Before transformers 5.24, whose masks it takes, nothing changes.
    """
    import transformers
    from packaging.version import Version

    config: Any = base_model(model).config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before != "sdpa" or Version(transformers.__version__) < Version("5.24"):
        yield
        return
    register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
