"""The tower of the tiny Qwen2.5-VL, packed, in every release: the same results, and a model left as it was found."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.model.attention.distinct_images import DistinctImages
from grpo_toolkit.model.attention.frozen_tower import FrozenTower
from grpo_toolkit.model.attention.packed_vision import NAME, VisionPacking, packed_vision
from grpo_toolkit.model.attention.segment_attention import packed_attention
from grpo_toolkit.model.attention.vision_towers import find_towers
from grpo_toolkit.model.cache_probe import vision_tower
from tests.support.training import LANGUAGE_QV, v5_only

if TYPE_CHECKING:
    from pathlib import Path

IS_V5 = Version(transformers.__version__) >= Version("5.0")
HAS_DENSE_MASK = Version(transformers.__version__) < Version("4.54")


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


def test_tower_and_its_gradients_equal_the_loop_in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        away = [
            float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True) if b.norm() > 1e-6
        ]
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
    # Windows of 16 patches and less; then whole frames, one so long that the others are a batch of their own.
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
    images = [
        Image.new("RGB", (56, 84), (90, 120, 30)),
        Image.new("RGB", (56, 56)),
        Image.new("RGB", (56, 84), (90, 120, 30)),
    ]
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


@pytest.mark.parametrize("way", ["inference_ready", "DecodeAhead"])
def test_it_is_a_setting_without_a_training(model: Any, calls: list[torch.Size], way: str) -> None:
    from grpo_toolkit import DecodeAhead, inference_ready

    image, start, end = model.config.image_token_id, model.config.vision_start_token_id, 5
    patches = torch.randn(64, 1176, generator=torch.Generator().manual_seed(4))
    row = [start, *[image] * 16, end]
    inputs = {
        "input_ids": torch.tensor([row, row]),
        "attention_mask": torch.ones(2, 18, dtype=torch.long),
        "pixel_values": torch.cat([patches, patches]),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * 2),
    }
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}

    def tower_calls(packed: bool) -> tuple[list[list[int]], list[int]]:
        calls.clear()
        if way == "DecodeAhead":
            output = DecodeAhead(model, packed_vision=packed).generate(**inputs, **options)
        else:
            with inference_ready(model, packed_vision=packed):
                output = model.generate(**inputs, **options)
        return output.tolist(), [shape[2] for shape in calls]

    plain, packed = tower_calls(False), tower_calls(True)
    assert packed[0] == plain[0]
    # Of two copies of an image one, in a call a layer: four windows of 16 patches, then all 64.
    assert packed[1][:2] == [16, 64]
    assert len(packed[1]) < len(plain[1])
    assert not vision_tower(model)._forward_pre_hooks


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
    packings = []

    def fail() -> None:
        with packed_vision(model) as packing:
            packings.append((packing.unmarked, _state(model) == before))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert packings == [(1 if IS_V5 else 0, False)]
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


@pytest.mark.skipif(IS_V5 or HAS_DENSE_MASK, reason="GLM-4V asks for flash_attention_2 by name in 4.57")
def test_towers_out_of_reach_are_left_with_a_line() -> None:
    from transformers.models.glm4v.modeling_glm4v import Glm4vVisionConfig, Glm4vVisionModel

    tower = Glm4vVisionModel(Glm4vVisionConfig(depth=1, hidden_size=32, intermediate_size=32, num_heads=2))
    with packed_vision(tower) as packing:
        assert packing.layers == 0
    assert packing.summary() == (
        f"vision attention left as it is: transformers {transformers.__version__} gives no way to reach its "
        "Glm4vVisionAttention; each distinct image encoded once"
    )


def test_text_models_are_left_alone() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    packing = VisionPacking(transformers.LlamaForCausalLM(config))
    assert (packing.layers, packing.summary()) == (0, "no vision tower to pack")


@v5_only
def test_the_registered_attention_and_its_masks_are_sdpas_without_segments(model: Any) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with packed_vision(model):
        assert ALL_ATTENTION_FUNCTIONS[NAME] is packed_attention
        assert ALL_MASK_ATTENTION_FUNCTIONS[NAME] is sdpa_mask
    inputs = torch.randn(3, 1, 4, 12, 16)
    layer = torch.nn.Module()
    found, _ = packed_attention(layer, *inputs, None, scaling=0.3, is_causal=False)
    assert torch.equal(found, ALL_ATTENTION_FUNCTIONS["sdpa"](layer, *inputs, None, scaling=0.3, is_causal=False)[0])


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
