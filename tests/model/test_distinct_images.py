"""Images that are equal by their content, and features and gradients of those that were encoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit.model.attention import distinct_images
from grpo_toolkit.model.attention import image_digests as image_digests_module
from grpo_toolkit.model.attention.distinct_images import DistinctImages, UnknownOutputError, repeat_for_copies
from grpo_toolkit.model.attention.gather_copies import repeat_spans
from grpo_toolkit.model.attention.image_digests import by_digests, equal_images, equal_rows, image_digests
from grpo_toolkit.model.attention.packed_vision import packed_vision
from tests.support.models import build_llava

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("way", ["compared", "digests"])
def test_images_are_equal_by_their_bits_and_their_grid(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "digests":  # as on a GPU
        monkeypatch.setattr(image_digests_module, "_compared", lambda *given: by_digests(*given))
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


def test_rows_of_any_field_are_told_apart() -> None:
    assert equal_rows(torch.tensor([[True, False], [True, True], [True, False]])) == [0, 1, 0]
    assert equal_rows(torch.tensor([3, 3, 4])) == [0, 0, 2]
    assert equal_rows(torch.zeros(2, 0)) == [0, 0]
    # Long ones that differ in one place, which no sample of their rows shows.
    images = torch.zeros(3, 100, 5)
    images[1, 51, 2] = 1
    assert equal_images(images.reshape(300, 5), torch.tensor([[1, 10, 10]] * 3)) == ([100] * 3, [0, 1, 0])


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
    with pytest.raises(UnknownOutputError):
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


@pytest.mark.parametrize("fault", ["equal_images", "repeat_for_copies"])
def test_a_fault_of_ours_leaves_the_forward_as_it_was(
    fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(distinct_images, fault, fail)
    tower = Strange()
    DistinctImages(tower)
    patches, grid = torch.randn(4, 2).repeat(2, 1), torch.tensor([[1, 2, 2]] * 2)
    expected = torch.nn.functional.pad(patches, (0, 0, 0, 1))
    assert all(torch.equal(tower(patches, grid), expected) for _ in range(2))
    assert len(tower._forward_pre_hooks) == len(tower._forward_hooks) == 0
    assert ["a fault of ours" in record.message for record in caplog.records] == [True]


def test_towers_of_whole_pictures_encode_each_once_too(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(build_llava(tmp_path / "llava")).eval()
    pixels = torch.randn(4, 3, 28, 28)
    pixels[2], pixels[3] = pixels[0], pixels[0]
    tokens = torch.full((4, 8), 40)
    tokens[:, 1:5] = model.config.image_token_id
    inputs = {"input_ids": tokens, "pixel_values": pixels}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        return [logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    plain = gradients()
    with packed_vision(model) as packing:
        packed = gradients()
    assert (packing.images[0].encoded, packing.images[0].asked) == (2, 4)
    assert len(packed) == len(plain)
    for found, expected in zip(packed, plain, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
