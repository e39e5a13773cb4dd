"""Grouped attention for decode steps: equal to SDPA, with padding, sliding windows and M-RoPE, or not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_toolkit.model.load import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)


class Layer:
    """An attention layer, as far as SDPA looks at it."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        self.num_key_value_groups = groups
        self.training = False


class Operations(TorchDispatchMode):
    """The shapes of what is copied for several query heads, and how many calls of SDPA there are."""

    def __init__(self) -> None:
        super().__init__()
        self.sdpa = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sdpa += "scaled_dot_product" in str(func)
        return func(*args, **(kwargs or {}))


def attend(query: torch.Tensor, keys: torch.Tensor, mask: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of SDPA and of grouped attention; the values are the keys turned around."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from grpo_toolkit.model.attention.grouped_decode import grouped_decode_attention

    layer: Any = Layer(query.shape[1] // keys.shape[1])
    functions: tuple[Callable[..., Any], ...] = (sdpa_attention_forward, grouped_decode_attention)
    one, two = (function(layer, query, keys, keys.flip(2), mask, **settings)[0] for function in functions)
    return one, two


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("masked", ["no", "booleans", "numbers", "every head"])
def test_it_is_equal_to_sdpa(heads: tuple[int, int], masked: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads[0], 1, 16, dtype=torch.float64)
    keys = torch.randn(3, heads[1], 40, 16, dtype=torch.float64)
    mask: Any = torch.rand(3, heads[0] if masked == "every head" else 1, 1, 40) < 0.7
    if masked == "no":
        mask = None
    elif masked == "numbers":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    one, two = attend(query, keys, mask, scaling=0.3)
    assert one.shape == two.shape == (3, 1, heads[0], 16)
    assert (one - two).abs().max() < 1e-14


def test_in_half_precision_it_is_no_farther_from_float64_than_eager_attention() -> None:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from grpo_toolkit.model.attention.grouped_decode import grouped_decode_attention

    torch.manual_seed(0)
    query, keys, mask = torch.randn(8, 16, 1, 64), torch.randn(8, 2, 300, 64), torch.rand(8, 1, 1, 300) < 0.8
    exact = attend(query.double(), keys.double(), mask, scaling=0.125)[0]
    layer: Any = Layer(8)
    half_query, half_keys = query.bfloat16(), keys.bfloat16()
    numbers = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    eager = eager_attention_forward(layer, half_query, half_keys, half_keys.flip(2), numbers, scaling=0.125)[0]
    grouped = grouped_decode_attention(layer, half_query, half_keys, half_keys.flip(2), mask, scaling=0.125)[0]
    assert (grouped - exact).abs().mean() < 1.05 * (eager - exact).abs().mean()


def test_what_is_no_decode_step_goes_to_sdpa() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 12, 8)
    with Operations() as seen:
        one, two = attend(torch.randn(2, 4, 12, 8), keys, None)  # a prefill
    assert torch.equal(one, two)
    assert seen.sdpa == 2
    bias = torch.randn(2, 4, 1, 12)
    one, two = attend(torch.randn(2, 4, 1, 8), keys, None, position_bias=bias)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="softcap"):
        attend(torch.randn(2, 4, 1, 8), keys, None, softcap=30.0)
    with Operations() as seen:
        attend(torch.randn(2, 4, 1, 8), keys, None, output_attentions=False)
    assert seen.sdpa == 1  # SDPA's own; asking for nothing is no reason


def padded(length: int = 9, padding: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 6])
def test_a_model_says_the_same_with_left_padding_and_sliding_windows(cache: str, window: int | None) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_toolkit.model.attention.grouped_decode import grouped_decoding

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=window is not None, sliding_window=window, max_window_layers=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": cache,
        "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    inputs = padded()
    plain = torch.stack(model.generate(**inputs, **settings).logits)
    with grouped_decoding(model), Operations() as seen:
        grouped = torch.stack(model.generate(**inputs, **settings).logits)
    assert seen.sdpa == 2  # the prefill's, one a layer
    assert model.config._attn_implementation == "sdpa"
    assert (plain - grouped).abs().max() < 1e-5
    # The comparison fails where padding is attended to.
    unmasked = torch.stack(model.generate(input_ids=inputs["input_ids"], attention_mask=None, **settings).logits)
    assert (plain - unmasked).abs().max() > 0.1


def test_decoding_ahead_with_it(qwen: Path) -> None:
    from grpo_toolkit import DecodeAhead

    model = load_model(qwen)[0]
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "cache_implementation": "static",
        "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    plain = torch.stack(model.generate(**padded(), **settings).logits)
    with Operations() as seen:
        grouped = torch.stack(DecodeAhead(model, grouped=True).generate(**padded(), **settings).logits)
    assert seen.sdpa == 2
    assert (plain - grouped).abs().max() < 1e-5


def test_a_model_with_pictures_keeps_its_towers_attention(qwen: Path) -> None:
    from grpo_toolkit.model.attention.grouped_decode import grouped_decoding

    model = load_model(qwen)[0]
    with grouped_decoding(model):
        assert model.config.text_config._attn_implementation == "grouped_decode"
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"
    model.config.text_config._attn_implementation = "eager"
    with grouped_decoding(model):
        assert model.config.text_config._attn_implementation == "eager"
