"""The distinct rows of a rollout: equal by content, wherever they stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from grpo_toolkit.model.rollouts.shared_prefill import distinct_rows

IMAGE = 9
QWEN: Any = SimpleNamespace(image_token_id=IMAGE, vision_config=SimpleNamespace(spatial_merge_size=2))
LLAVA: Any = SimpleNamespace(image_token_index=IMAGE)


def qwen_batch(*rows: tuple[list[int], list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    """Rows of tokens, and for each row its images as (number of merged tokens, value of all its pixels)."""
    tokens = torch.tensor([ids for ids, _ in rows])
    images = [image for _, found in rows for image in found]
    pixels = [torch.full((4 * size, 3), float(value)) for size, value in images]
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor([[1, 2, 2 * size] for size, _ in images]),
    }


def test_rows_are_equal_by_tokens_masks_and_pixels() -> None:
    rows = distinct_rows(
        QWEN,
        qwen_batch(
            ([1, 9, 9, 2], [(2, 7)]),
            ([1, 9, 9, 2], [(2, 8)]),  # the same words, another image
            ([1, 9, 9, 3], [(2, 7)]),
            ([1, 9, 9, 2], [(1, 7), (1, 7)]),  # as many placeholders, in two images
            ([1, 9, 9, 2], [(2, 7)]),
            ([1, 9, 9, 2], [(2, 8)]),
        ),
    )
    assert rows.index.tolist() == [0, 1, 2, 3, 0, 1]
    assert rows.inputs["input_ids"].tolist() == [[1, 9, 9, 2], [1, 9, 9, 2], [1, 9, 9, 3], [1, 9, 9, 2]]
    assert rows.inputs["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 4], [1, 2, 4], [1, 2, 2], [1, 2, 2]]
    assert rows.inputs["pixel_values"][:, 0].tolist() == [7.0] * 8 + [8.0] * 8 + [7.0] * 16


def test_rows_without_an_image_stand_among_others() -> None:
    text: Any = ([1, 2, 3], [])
    picture: Any = ([1, 9, 3], [(1, 5)])
    rows = distinct_rows(QWEN, qwen_batch(text, picture, text, picture))
    assert rows.index.tolist() == [0, 1, 0, 1]
    assert rows.inputs["pixel_values"].shape == (4, 3)


def test_another_mask_is_another_row() -> None:
    batch = qwen_batch(([1, 9, 2], [(1, 7)]), ([1, 9, 2], [(1, 7)]), ([1, 9, 2], [(1, 7)]))
    batch["attention_mask"][1, 0] = 0
    assert distinct_rows(QWEN, batch).index.tolist() == [0, 1, 0]


def test_images_that_belong_to_no_known_row_leave_all_rows_distinct() -> None:
    batch = qwen_batch(([1, 9, 2], [(2, 7)]), ([1, 9, 2], [(2, 7)]))  # more patches than placeholders
    rows = distinct_rows(QWEN, batch)
    assert rows.index.tolist() == [0, 1]
    assert rows.count == 2
    tokens = torch.tensor([[1, 9, 9], [1, 2, 3]])
    unknown = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.zeros(2, 3, 4, 4)}
    assert distinct_rows(LLAVA, unknown).index.tolist() == [0, 1]  # two images in a row, none in the other


def test_one_image_a_row() -> None:
    tokens = torch.tensor([[1, 9, 9]] * 3)
    pixels = torch.zeros(3, 3, 4, 4)
    pixels[1] = 1
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    rows = distinct_rows(LLAVA, inputs)
    assert rows.index.tolist() == [0, 1, 0]
    assert rows.inputs["pixel_values"].shape == (2, 3, 4, 4)
