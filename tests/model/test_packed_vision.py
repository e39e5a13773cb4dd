"""Packed vision: the same results as the loop over segments, in one call a layer; each distinct image once; no gradient
for a frozen tower; and a model that is left as it was found."""

from __future__ import annotations

import copy
import glob
import importlib
import inspect
import os
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.model.attention import segment_attention
from grpo_toolkit.model.attention.distinct_images import DistinctImages, UnknownOutput, repeat_for_copies
from grpo_toolkit.model.attention.frozen_tower import FrozenTower
from grpo_toolkit.model.attention.gather_copies import repeat_spans
from grpo_toolkit.model.attention.image_digests import equal_images, image_digests
from grpo_toolkit.model.attention.packed_vision import NAME, VisionPacking, packed_vision
from grpo_toolkit.model.attention.segment_attention import packed_attention
from grpo_toolkit.model.attention.segment_plan import batch_lengths, make_plan, plan_of
from grpo_toolkit.model.attention.vision_towers import asks_by_name, find_towers, is_attention_class
from grpo_toolkit.probe import vision_tower
from training import LANGUAGE_QV, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable

IS_V5 = Version(transformers.__version__) >= Version("5.0")
OLD_RELEASE = Version(transformers.__version__) < Version("4.52")

RAGGED = [64] * 6 + [32, 64, 16, 48, 4]
MIXED = [900, 17, 33, 901, 64]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries that SDPA is called with."""
    seen: list[torch.Size] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(query.shape)
        return plain(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return seen


def _borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _inputs(rows: int, dtype: torch.dtype, *, heads: int = 4, key_heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(rows, heads, 16), (rows, key_heads, 16), (rows, key_heads, 16)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for shape in shapes]
    return [tensor.to(dtype).transpose(0, 1)[None].requires_grad_() for tensor in tensors]


class Layer(torch.nn.Module):
    is_causal = False
    num_key_value_groups = 1


def _attend(lengths: list[int], dtype: torch.dtype, *, loop: bool, layer: Any = None) -> list[torch.Tensor]:
    """The output and the three gradients, packed or by the library's way of one call a segment."""
    layer = layer or Layer()
    inputs = _inputs(sum(lengths), dtype, key_heads=4 // layer.num_key_value_groups)
    options = {"scaling": 0.3, "is_causal": layer.is_causal}
    if loop:
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True)
        out = torch.cat([packed_attention(layer, *part, None, **options)[0] for part in parts], dim=1)
    else:
        out = packed_attention(layer, *inputs, None, cu_seq_lens_q=_borders(lengths), **options)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
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
    assert (plan.order, plan.batches[0].mask) == (None, None)
    assert not make_plan(_borders([8, 8, 7]), torch.device("cpu")).is_even


# Towers of the installed transformers.

SMALL = {
    "depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "out_hidden_size": 32, "text_hidden_size": 32, "head_dim": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "num_position_embeddings": 64,
    "attention_head_dim": 16,
}  # fmt: skip
GRID = [[1, 4, 8], [1, 8, 4], [1, 4, 8], [1, 2, 4]]
"""Four images, of which the third is the first."""


def _modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _sources() -> dict[str, str]:
    root = os.path.join(os.path.dirname(transformers.__file__), "models", "*", "modeling_*.py")
    paths = [Path(path) for path in glob.glob(root)]
    return {path.parent.name: path.read_text() for path in paths if path.stem == f"modeling_{path.parent.name}"}


LOOPING = sorted(
    family for family, source in _sources().items() if "cu_seqlens[1:] - cu_seqlens[:-1]" in source and IS_V5
)


def _layers_that_split(family: str) -> set[str]:
    """Names of the classes whose forward splits its rows by `cu_seqlens`, by their source."""
    found = set()
    for name, kind in vars(_modeling(family)).items():
        if inspect.isclass(kind) and kind.__module__ == _modeling(family).__name__ and "forward" in vars(kind):
            source = inspect.getsource(inspect.unwrap(kind.forward))
            if "cu_seqlens[1:] - cu_seqlens[:-1]" in source and ".split(" in source:
                found.add(name)
    return found


@v5_only
@pytest.mark.parametrize("family", LOOPING)
def test_every_layer_that_splits_by_segments_is_reached(family: str) -> None:
    layers = _layers_that_split(family)
    still_looping = {
        name
        for name in layers
        if not (is_attention_class(getattr(_modeling(family), name)) and asks_by_name(getattr(_modeling(family), name)))
    }
    assert still_looping == set()


@v5_only
def test_the_families_that_split_by_segments_are_many() -> None:
    assert len([family for family in LOOPING if _layers_that_split(family)]) >= 20
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"} <= set(LOOPING)


def _tower_class(family: str) -> Any:
    kinds = [
        kind
        for kind in vars(_modeling(family)).values()
        if inspect.isclass(kind)
        and kind.__module__ == _modeling(family).__name__
        and issubclass(kind, transformers.PreTrainedModel)
        and "grid_thw" in inspect.signature(inspect.unwrap(kind.forward)).parameters
    ]
    return kinds[-1] if kinds else None


def _build_tower(family: str) -> tuple[Any, Callable[[], Any]]:
    """A tiny tower of a family, and what runs it on the four images of `GRID`."""
    kind = _tower_class(family)
    if kind is None:
        pytest.skip("its tower takes no grid")
    known = set(inspect.signature(kind.config_class).parameters)
    try:
        config = kind.config_class(**{name: value for name, value in SMALL.items() if name in known})
        torch.manual_seed(0)
        tower = kind(config).eval()
    except (ValueError, IndexError) as error:
        pytest.skip(f"not built from these few numbers: {error}")
    with torch.no_grad():  # far enough from zero for attention to matter
        for parameter in tower.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    grid = torch.tensor(GRID)
    sizes = grid.prod(-1).tolist()
    extra = {"merge_sizes": torch.full((4,), 2)} if family == "video_llama_3" else {}
    side, channels = config.patch_size, getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    times = getattr(config, "temporal_patch_size", 1) or 1
    for shape in ((channels * times * side**2,), (channels, side, side), (channels * side**2,), (2 * 3 * side**2,)):
        images = [torch.randn(size, *shape, generator=torch.Generator().manual_seed(size + i)) for i, size in
                  enumerate(sizes)]  # fmt: skip
        images[2] = images[0].clone()
        patches = torch.cat(images)
        try:
            tower(patches, grid_thw=grid, **extra)
        except (RuntimeError, ValueError, TypeError):
            continue
        return tower, lambda: tower(patches, grid_thw=grid, **extra)
    pytest.skip("takes patches of another shape")


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


@v5_only
@pytest.mark.parametrize("family", LOOPING)
def test_towers_of_every_family_make_one_call_a_layer(family: str, calls: list[torch.Size]) -> None:
    tower, run = _build_tower(family)
    layers = sum(is_attention_class(type(module)) for module in tower.modules())
    calls.clear()
    before = _tensors(run())
    split = len(calls)
    with packed_vision(tower) as packing:
        run()  # copies that can't be told apart in this family's output are encoded again, once
        calls.clear()
        after = _tensors(run())
    assert (packing.layers, len(calls)) == (layers, layers)
    assert split >= 4 * layers
    for found, expected in zip(after, before, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tower.config._attn_implementation == "sdpa"
