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
HAS_DENSE_MASK = Version(transformers.__version__) < Version("4.54")

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


# Distinct images.


def test_images_are_equal_by_their_bits_and_their_grid() -> None:
    grid = torch.tensor([[1, 2, 4], [1, 4, 2], [1, 2, 4], [1, 2, 4], [1, 2, 4]])
    image = torch.randn(8, 6)
    nearly, swapped = image.clone(), image.clone()
    nearly[7, 5] = torch.nextafter(nearly[7, 5], torch.tensor(9.0))
    swapped[[0, 1]] = swapped[[1, 0]]
    for dtype in (torch.float64, torch.float32):
        patches = torch.cat([image, image, image.clone(), nearly, swapped]).to(dtype)
        assert equal_images(patches, grid) == ([8] * 5, [0, 1, 0, 3, 4])
    half = torch.cat([image, image, image, -image, image * 0]).bfloat16()
    assert equal_images(half, grid) == ([8] * 5, [0, 1, 0, 3, 4])


def test_images_in_several_pieces_have_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_toolkit.model.attention import image_digests as module

    grid, patches = torch.tensor([[1, 2, 4], [2, 2, 2]]), torch.randn(16, 6)
    whole = image_digests(patches, grid)
    monkeypatch.setattr(module, "ROWS_AT_ONCE_ELEMENTS", 18)
    assert torch.equal(image_digests(patches, grid), whole)
    assert len(set(whole.flatten().tolist())) == 4


def test_a_grid_that_is_not_the_patches_is_left_to_the_model() -> None:
    assert equal_images(torch.randn(15, 6), torch.tensor([[1, 2, 4], [1, 2, 4]])) is None


def test_gradients_of_copies_are_added_and_rounded_once() -> None:
    spans = ((0, 3), (3, 5), (0, 3), (0, 3), (3, 5))
    features = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: repeat_spans(rows, spans, 0), features)
    assert torch.autograd.gradcheck(lambda rows: repeat_spans(rows[None], spans, 1), features)

    half = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = repeat_spans(half, ((0, 1),) * 3, 0)
    # 256 + 1 is 256 in bfloat16, and 256 + 1 + 1 is 258.
    (grad,) = torch.autograd.grad(out, half, torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert grad.item() == 258


def test_outputs_of_every_form_are_repeated() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    sizes, order = [8, 4], [0, 1, 0]
    patches, merged = torch.arange(12.0)[:, None], torch.arange(3.0)[:, None]
    all_patches = torch.cat([patches[:8], patches[8:], patches[:8]])
    all_merged = torch.tensor([[0.0], [1.0], [2.0], [0.0], [1.0]])

    assert torch.equal(repeat_for_copies(patches, sizes, order, merge=4), all_patches)
    assert torch.equal(repeat_for_copies(patches[None], sizes, order, merge=4), all_patches[None])
    found, layers = repeat_for_copies((merged, [patches, merged, merged]), sizes, order, merge=4)
    assert torch.equal(found, all_merged)
    assert [len(layer) for layer in layers] == [20, 5, 5]
    images = repeat_for_copies([merged[:2], merged[2:]], sizes, order, merge=4)
    assert [image.flatten().tolist() for image in images] == [[0, 1], [2], [0, 1]]
    output = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=merged)
    repeated = repeat_for_copies(output, sizes, order, merge=4)
    assert torch.equal(repeated.last_hidden_state, all_patches)
    assert torch.equal(repeated["pooler_output"], all_merged)


@pytest.mark.parametrize("output", [torch.zeros(7, 2), [torch.zeros(8, 2)], {"rows": 1}])
def test_outputs_that_cannot_be_told_apart_are_refused(output: Any) -> None:
    with pytest.raises(UnknownOutput):
        repeat_for_copies(output, [8], [0, 0], merge=4)


class Strange(torch.nn.Module):
    """A tower whose output has a row more than the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(grid_thw))
        return torch.nn.functional.pad(hidden_states, (0, 0, 0, 1))


def test_a_tower_with_another_output_encodes_every_copy_again(caplog: pytest.LogCaptureFixture) -> None:
    tower = Strange()
    DistinctImages(tower)
    patches, grid = torch.randn(4, 2).repeat(2, 1), torch.tensor([[1, 2, 2]] * 2)
    with caplog.at_level("INFO"):
        outputs = [tower(patches, grid), tower(patches, grid_thw=grid)]
    assert tower.seen == [1, 2, 2]
    assert all(torch.equal(output[:8], patches) for output in outputs)
    assert [record.levelname for record in caplog.records] == ["INFO"]


# The tower of the tiny Qwen2.5-VL, in every release.


@pytest.fixture(scope="module")
def model(qwen: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(qwen).eval()


def _keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers compute norms and rotary embeddings in float32, whatever their dtype is; not so in here."""
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64 and torch.float32 in (*args, *options.values()):
            return tensor
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: to(tensor, torch.float32))


def _pictures(*, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid of an image with windows cut at the edge, a video, a small image, and copies of two of them."""
    grids = [(1, 18, 10), (2, 8, 6), (1, 4, 4), (1, 18, 10), (2, 8, 6)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(t * h * w, 1176, generator=generator, dtype=torch.float64) for t, h, w in grids]
    images[3:] = images[0], images[1]
    return torch.cat(images).to(dtype), torch.tensor(grids)


def _merged(output: Any) -> torch.Tensor:
    """The tokens for the language model: transformers 5 has them in an output with the patches."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _run(tower: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    patches, grid = _pictures(dtype=dtype)
    tower.zero_grad()
    out = _merged(tower(patches, grid_thw=grid))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights.to(dtype)).sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in tower.parameters())]


def test_tower_and_its_gradients_equal_the_loop_in_float64(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _keep_float64(monkeypatch)
    double = copy.deepcopy(model).double()
    tower = vision_tower(double)
    plain = _run(tower, torch.float64)
    with packed_vision(double) as packing:
        packed = _run(tower, torch.float64)
    assert (packing.layers, packing.images[0].encoded, packing.images[0].asked) == (2, 3, 5)
    assert (packed[0] - plain[0]).abs().max() <= 2e-15 * plain[0].abs().max()
    # Relative to the largest gradient: those of the keys' biases are zero but for rounding.
    largest = max(float(grad.abs().max()) for grad in plain[1:])
    assert max(float((a - b).abs().max()) for a, b in zip(packed[1:], plain[1:], strict=True)) <= 1e-14 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tower_is_as_near_to_float64_as_the_loop(
    model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _keep_float64(patch)
        exact = _run(vision_tower(copy.deepcopy(model).to(dtype).double()), torch.float64)
    lower = copy.deepcopy(model).to(dtype)
    loop = _run(vision_tower(lower), dtype)
    with packed_vision(lower):
        packed = _run(vision_tower(lower), dtype)

    def distance(found: list[torch.Tensor]) -> tuple[float, float]:
        away = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True) if b.norm() > 1e-6]
        return away[0], sum(away[1:]) / len(away[1:])

    (loop_out, loop_grads), (out, grads) = distance(loop), distance(packed)
    assert out <= 1.25 * loop_out
    assert grads <= 1.25 * loop_grads


def test_tower_makes_one_call_a_layer(model: Any, calls: list[torch.Size]) -> None:
    tower = vision_tower(model)
    patches, grid = _pictures()
    with torch.no_grad():
        tower(patches, grid_thw=grid)
        assert len(calls) == (2 if HAS_DENSE_MASK else 54)
        with packed_vision(model) as packing:
            calls.clear()
            tower(patches, grid_thw=grid)
    assert packing.layers == 2
    # Windows of 16 patches and less; a layer of whole frames, of which one is so long that the others stay by themselves.
    assert [tuple(shape[::2]) for shape in calls] == [(24, 16), (3, 48), (1, 180)]


def test_recompute_of_checkpointed_blocks_takes_the_same_way(model: Any, calls: list[torch.Size]) -> None:
    trained = copy.deepcopy(model).train()
    for reentrant in (False, True):
        trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
        trained.enable_input_require_grads()
        plain = _run(vision_tower(trained), torch.float32)
        with packed_vision(trained):
            calls.clear()
            packed = _run(vision_tower(trained), torch.float32)
        assert sorted(tuple(shape[::2]) for shape in calls) == sorted([(24, 16), (3, 48), (1, 180)] * 2)
        for found, expected in zip(packed, plain, strict=True):
            assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_generation_says_the_same_and_encodes_an_image_once(
    model: Any, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(qwen)
    processor.tokenizer.padding_side = "left"
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in
             ("What is this?", "What is number 1?", "What is this?")]  # fmt: skip
    images = [Image.new("RGB", (56, 84), (90, 120, 30)), Image.new("RGB", (56, 56)), Image.new("RGB", (56, 84), (90, 120, 30))]
    texts = [processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for messages in asked]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    with packed_vision(model) as packing:
        packed = model.generate(**inputs, **options)
    assert (packing.images[0].encoded, packing.images[0].asked) == (2, 3)
    assert torch.equal(packed.sequences, plain.sequences)
    for found, expected in zip(packed.scores, plain.scores, strict=True):
        assert (found - expected).abs().max() < 1e-4


def test_dropout_in_the_tower_is_drawn_for_every_copy(model: Any) -> None:
    tower = vision_tower(copy.deepcopy(model))
    tower.merger.mlp[1] = torch.nn.Sequential(tower.merger.mlp[1], torch.nn.Dropout(0.5))
    patches, grid = _pictures()
    images = DistinctImages(tower)
    tower.train()(patches, grid_thw=grid)
    assert images.asked == 0
    tower.eval()(patches, grid_thw=grid)
    assert (images.encoded, images.asked) == (3, 5)


# What is put back, and what is left alone.


def _state(model: Any) -> list[Any]:
    return [
        (
            sorted(vars(module)),
            [list(module._forward_hooks.values()), list(module._forward_pre_hooks.values())],
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for module in model.modules()
    ]


def test_the_model_is_put_back_also_after_an_exception(model: Any) -> None:
    model.enable_input_require_grads()
    model.requires_grad_(False)
    before = _state(model)
    with pytest.raises(KeyError), packed_vision(model) as packing:
        assert _state(model) != before
        assert packing.unmarked == (1 if IS_V5 else 0)
        raise KeyError
    assert _state(model) == before
    model.disable_input_require_grads()
    model.requires_grad_(True)
    assert not any(module._forward_hooks for module in model.modules())


def test_packing_twice_is_packing_once(model: Any) -> None:
    before = _state(model)
    with packed_vision(model) as outer, packed_vision(model) as inner:
        vision_tower(model)(*_pictures())
        assert (outer.layers, outer.images[0].asked, len(inner.images)) == (2, 5, 0)
    assert _state(model) == before


def test_a_copy_of_a_packed_model_stands_alone(model: Any, calls: list[torch.Size]) -> None:
    with packed_vision(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in vision_tower(twin).parameters():
            parameter.mul_(1.1)
    patches, grid = _pictures()
    expected = copy.deepcopy(model)
    expected.load_state_dict(twin.state_dict())
    found = _merged(vision_tower(twin)(patches, grid_thw=grid))
    assert [tuple(shape[::2]) for shape in calls] == [(24, 16), (3, 48), (1, 180)]
    exact = _merged(vision_tower(expected)(patches, grid_thw=grid))
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (found - _merged(vision_tower(model)(patches, grid_thw=grid))).abs().max() > 0.1 * exact.abs().max()


def test_nothing_of_it_is_saved(model: Any, tmp_path: Path) -> None:
    with packed_vision(model):
        model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert [tower.name for tower in find_towers(again)] == [tower.name for tower in find_towers(model)]
    assert getattr(vision_tower(again), "config", again.config)._attn_implementation == "sdpa"


@v5_only
@pytest.mark.parametrize("chosen", ["eager", "flash_attention_2"])
def test_another_attention_that_was_chosen_is_left(model: Any, chosen: str) -> None:
    other = copy.deepcopy(model)
    vision_tower(other).config._attn_implementation = chosen
    with packed_vision(other) as packing:
        assert vision_tower(other).config._attn_implementation == chosen
    assert packing.layers == 0
    assert packing.summary() == (
        f"vision attention left as it is: '{chosen}' is its attention; each distinct image encoded once"
    )


def test_text_models_are_left_alone() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    packing = VisionPacking(transformers.LlamaForCausalLM(config))
    assert (packing.layers, packing.summary()) == (0, "no vision tower to pack")


@v5_only
def test_the_registered_attention_and_its_masks_are_sdpas_without_segments() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with packed_vision(_build_tower("qwen2_5_vl")[0]):
        assert ALL_ATTENTION_FUNCTIONS[NAME] is packed_attention
        assert ALL_MASK_ATTENTION_FUNCTIONS[NAME] is sdpa_mask
    inputs = _inputs(12, torch.float32)
    assert torch.equal(
        packed_attention(Layer(), *inputs, None, scaling=0.3)[0],
        ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(), *inputs, None, scaling=0.3)[0],
    )


# A frozen tower.


def test_a_frozen_tower_is_neither_recomputed_nor_changes_the_adapters_gradients(model: Any, qwen: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(qwen)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 84), (90, 120, 30))], return_tensors="pt")
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=LANGUAGE_QV, init_lora_weights=False)
    ).train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    runs: list[int] = []
    tower = vision_tower(adapted)
    tower.blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        adapted.zero_grad()
        runs.clear()
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        found = {name: value.grad.clone() for name, value in adapted.named_parameters() if value.grad is not None}
        return found, len(runs)

    marked, with_mark = gradients()
    frozen = FrozenTower(tower)
    unmarked, without_mark = gradients()
    adapted.enable_input_require_grads()  # as TRL does after each rollout where the adapter is transformers' own
    _, marked_anew = gradients()
    frozen.close()
    _, closed = gradients()
    expected = (2, 1, 1, 2) if IS_V5 else (1, 1, 1, 1)
    assert (with_mark, without_mark, marked_anew, closed) == expected
    assert marked.keys() == unmarked.keys()
    assert all(torch.equal(marked[name], unmarked[name]) for name in marked)
    assert any(grad.abs().max() > 0 for grad in marked.values())


def test_a_tower_that_trains_keeps_its_mark(model: Any) -> None:
    trained = copy.deepcopy(model)
    trained.requires_grad_(False)
    trained.enable_input_require_grads()
    next(vision_tower(trained).parameters()).requires_grad_(True)
    assert FrozenTower(vision_tower(trained)).removed == []
