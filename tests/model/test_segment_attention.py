"""Attention over segments: the results of the loop in one call, or a few, and one plan for all layers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from grpo_toolkit.model.attention import decode_without_cudnn, segment_attention
from grpo_toolkit.model.attention.segment_attention import packed_attention
from grpo_toolkit.model.attention.segment_plan import batch_lengths, make_plan, plan_of

RAGGED = [64] * 6 + [32, 64, 16, 48, 4]
MIXED = [900, 17, 33, 901, 64]


def _borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _inputs(rows: int, dtype: torch.dtype, *, heads: int = 4, key_heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(rows, heads, 16), (rows, key_heads, 16), (rows, key_heads, 16)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for shape in shapes]
    return [tensor.to(dtype).transpose(0, 1)[None].requires_grad_() for tensor in tensors]


class _Counted:
    def __init__(self, function: Any) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs)


class Layer(torch.nn.Module):
    is_causal = False
    num_key_value_groups = 1


def _attend(
    lengths: list[int], dtype: torch.dtype, *, loop: bool, layer: Any = None, device: str = "cpu"
) -> list[torch.Tensor]:
    """The output and the three gradients, packed or by the library's way of one call a segment."""
    layer = layer or Layer()
    made = _inputs(sum(lengths), dtype, key_heads=4 // layer.num_key_value_groups)
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in made]
    options = {"scaling": 0.3, "is_causal": layer.is_causal}
    if loop:
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True)
        out = torch.cat([packed_attention(layer, *part, None, **options)[0] for part in parts], dim=1)
    else:
        out = packed_attention(layer, *inputs, None, cu_seq_lens_q=_borders(lengths).to(device), **options)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def _farthest(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize(
    "lengths", [[64], [64] * 5, RAGGED, MIXED, [1, 1, 2, 1]], ids=["one", "even", "ragged", "mixed", "tiny"]
)
def test_attention_equals_the_loop(lengths: list[int]) -> None:
    exact = _attend(lengths, torch.float64, loop=True)

    assert _farthest(_attend(lengths, torch.float64, loop=False), exact) < 2e-15
    for dtype in (torch.float32, torch.bfloat16):
        loop, packed = (_farthest(_attend(lengths, dtype, loop=way), exact) for way in (True, False))
        assert packed <= 1.25 * loop, dtype


def test_on_a_cpu_segments_of_several_lengths_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _attend(RAGGED, torch.float64, loop=True)
    monkeypatch.setattr(segment_attention, "LOOPED_ON", ("cpu",))
    monkeypatch.setattr(segment_attention, "_sdpa", counted := _Counted(segment_attention._sdpa))
    looped = _attend(RAGGED, torch.float64, loop=False)
    assert counted.count == len(RAGGED)
    assert _farthest(looped, exact) < 2e-15
    counted.count = 0
    _attend([64] * 5, torch.float64, loop=False)
    assert counted.count == 1


def test_attention_of_grouped_and_causal_layers_equals_the_loop() -> None:
    grouped, causal = Layer(), Layer()
    grouped.num_key_value_groups = 2
    causal.is_causal = True
    for layer in (grouped, causal):
        exact = _attend(RAGGED, torch.float64, loop=True, layer=layer)
        assert _farthest(_attend(RAGGED, torch.float64, loop=False, layer=layer), exact) < 2e-15


def test_attention_without_rows_and_with_empty_segments() -> None:
    empty = torch.zeros(1, 4, 0, 16)
    out, _ = packed_attention(Layer(), empty, empty, empty, None, cu_seq_lens_q=_borders([]))
    assert out.shape == (1, 0, 4, 16)

    inputs = _inputs(12, torch.float64)
    borders = torch.tensor([0, 5, 5, 12, 12])
    out, _ = packed_attention(Layer(), *inputs, None, cu_seq_lens_q=borders)
    expected, _ = packed_attention(Layer(), *inputs, None, cu_seq_lens_q=_borders([5, 7]))
    assert torch.equal(out, expected)


def test_attention_refuses_borders_that_are_not_the_rows() -> None:
    with pytest.raises(ValueError, match="cu_seqlens ends at 11, but there are 12 rows"):
        packed_attention(Layer(), *_inputs(12, torch.float32), None, cu_seq_lens_q=_borders([5, 6]))


def test_attention_under_autocast_computes_in_bfloat16() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, loop = (_attend(RAGGED, torch.float32, loop=way) for way in (False, True))
        query = _inputs(4, torch.float32)[0]
        assert segment_attention.compute_dtype(query) == torch.bfloat16
    exact = _attend(RAGGED, torch.float64, loop=True)
    assert packed[0].dtype == loop[0].dtype == torch.bfloat16
    assert _farthest(packed, exact) <= 1.25 * _farthest(loop, exact)


def test_batches_are_split_where_padding_costs_more_than_a_call() -> None:
    assert batch_lengths([64] * 9, call_cost=100) == [64]
    assert batch_lengths([64, 60, 64], call_cost=1000) == [64]
    assert batch_lengths([900, 8, 900, 8, 8], call_cost=1000) == [8, 900]
    assert batch_lengths([900, 8, 900, 8, 8], call_cost=10_000_000) == [900]
    assert batch_lengths([], call_cost=1) == []
    # More lengths than are tried as borders: the longest is always one of them.
    assert batch_lengths(list(range(1, 200)), call_cost=10**9) == [199]


def test_long_sequences_are_not_padded_to_the_longest(calls: list[torch.Size]) -> None:
    _attend([2000, 40, 40, 40, 40, 40, 40], torch.float32, loop=False)

    assert sorted(shape[0] * shape[2] for shape in calls) == [240, 2000]


@pytest.mark.parametrize("plans", [True, False])
def test_segments_are_kept_off_cudnn_where_it_plans_for_every_length(
    monkeypatch: pytest.MonkeyPatch, plans: bool
) -> None:
    seen: list[bool] = []
    library = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return library(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(decode_without_cudnn, "plans_per_length", lambda device: plans)  # as on Hopper
    _attend([64] * 3, torch.float32, loop=False)

    assert seen == [not plans]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_plan_is_made_once_for_the_layers_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or plain(tensor))
    borders, inputs = _borders(RAGGED), _inputs(sum(RAGGED), torch.float32)
    for _ in range(4):
        packed_attention(Layer(), *inputs, None, cu_seq_lens_q=borders)
    assert reads == [borders.shape]

    plan = plan_of(borders, torch.device("cpu"))
    assert plan_of(borders, torch.device("cpu")) is plan
    borders[-1] -= 1  # written in place: another plan
    assert plan_of(borders, torch.device("cpu")).lengths[-1] == 3
    with torch.inference_mode():
        assert plan_of(_borders([3, 4]), torch.device("cpu")).lengths == (3, 4)


def test_plans_do_not_outlive_their_borders() -> None:
    from grpo_toolkit.model.attention import segment_plan

    plan_of(_borders([2, 3]), torch.device("cpu"))
    kept = len(segment_plan._PLANS)
    for length in range(1, 20):
        plan_of(_borders([length, 3]), torch.device("cpu"))
    assert len(segment_plan._PLANS) <= kept + 1


def test_even_segments_are_a_view() -> None:
    plan = make_plan(_borders([8, 8, 8]), torch.device("cpu"))
    assert plan.is_even
    assert (plan.layout.order, plan.layout.batches[0].mask) == (None, None)
    assert not make_plan(_borders([8, 8, 7]), torch.device("cpu")).is_even


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_is_as_near_to_float64_as_the_loop(dtype: torch.dtype) -> None:
    exact = _attend(RAGGED + MIXED, torch.float64, loop=True)
    loop, packed = (
        _farthest([tensor.cpu() for tensor in _attend(RAGGED + MIXED, dtype, loop=way, device="cuda")], exact)
        for way in (True, False)
    )
    assert packed <= 1.5 * loop
    inputs = [tensor.cuda() for tensor in _inputs(sum(RAGGED), dtype)]
    plan = plan_of(_borders(RAGGED), inputs[0].device)
    options = {"dropout": 0.0, "is_causal": False}
    expected = "varlen" if dtype == torch.bfloat16 and segment_attention._varlen_takes_scale() else "batch"
    assert segment_attention.choose_kernel(inputs[0], inputs[1], plan, options) == expected


def test_a_kernel_that_is_not_to_be_had_costs_a_line_and_no_training(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available")

    expected = _attend(RAGGED, torch.float64, loop=True)
    segment_attention._tell_once.cache_clear()
    monkeypatch.setattr(segment_attention, "batch_attention", refuse)
    found = _attend(RAGGED, torch.float64, loop=False)
    assert _farthest(found, expected) <= 1e-15
    assert ["no kernel image" in record.message for record in caplog.records] == [True]
