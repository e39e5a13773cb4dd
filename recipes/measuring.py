"""How long each prompt really is, and where its boxes are once the image has been resized.

Sizes are read from the images' headers: nothing is decoded, so tens of thousands of rows take a minute, and `datasets`
keeps the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from answers import parse_box
from grpo_toolkit import InputError
from images import LARGEST_ASPECT_RATIO, PixelLimits, pixel_limits
from pictures import look_at

if TYPE_CHECKING:
    from datasets import Dataset

_TOKENISED = 256
"""Prompts among which the longest is looked for."""

_BYTES_A_TOKEN = 3  # About, to tell heavy prompts from light ones: English has four, digits one.


def keep_short(rows: Dataset, processor: Any, *, max_prompt_length: int | None) -> Dataset:
    """The rows whose prompt has at most so many tokens, image tokens included, and whose images can be resized.

    Args:
        rows (`Dataset`):
            In the row form, images included.
        processor:
            The model's, with the pixel limits of the training.
        max_prompt_length (`int`, *optional*):
            In tokens; None keeps prompts of any length.
    """
    limits = pixel_limits(processor)
    if limits is None and max_prompt_length is None:
        return rows
    keep = []
    for index, (row, sizes) in enumerate(zip(_without_images(rows), image_sizes(rows), strict=True)):
        if any(max(size) > LARGEST_ASPECT_RATIO * min(size) for size in sizes):
            continue
        if max_prompt_length is not None:
            if limits is not None:
                length = prompt_length(row["prompt"], sizes, processor, limits)
            else:  # Another family's processor: ask it, slow but right.
                length = _processed_length(rows[index], processor)
            if length > max_prompt_length:
                continue
        keep.append(index)
    return rows if len(keep) == len(rows) else rows.select(keep)


def prompt_length(
    prompt: list[dict[str, Any]], sizes: list[tuple[int, int]], processor: Any, limits: PixelLimits
) -> int:
    """Tokens of a prompt as the trainer will write it. The chat template has one placeholder for each image."""
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(prompt, images=list(sizes))
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(processor.tokenizer(text)["input_ids"]) + sum(limits.tokens(*size) - 1 for size in sizes)


def fit_boxes(rows: Dataset, processor: Any) -> Dataset:
    """Move boxes from the original image's pixels to those of the image as the model sees it.

    Qwen2.5-VL is told of no other size than that of the resized image, and answers in its pixels
    (https://github.com/om-ai-lab/VLM-R1/issues/44).
    """
    limits = pixel_limits(processor)
    if limits is None or "answer_type" not in rows.column_names or "box" not in rows.unique("answer_type"):
        return rows
    sizes = image_sizes(rows)
    answers = [
        fit_box(answer, size=size[0], limits=limits) if kind == "box" else answer
        for answer, kind, size in zip(rows["answer"], rows["answer_type"], sizes, strict=True)
    ]
    return rows.remove_columns("answer").add_column("answer", answers)


def fit_box(answer: str, *, size: tuple[int, int], limits: PixelLimits) -> str:
    """One box, in the frame of the resized image.

    Args:
        answer (`str`):
            `[x1, y1, x2, y2]` in pixels of the original image.
        size (`tuple[int, int]`):
            Width and height of the original image.
        limits (`PixelLimits`):
            How the processor resizes.

    Raises:
        InputError: the answer is no box.
    """
    box = parse_box(answer)
    if box is None:
        raise InputError(
            f"answer {answer!r}: its answer_type is box, but it is no [x1, y1, x2, y2] with x1 < x2, y1 < y2"
        )
    (width, height), (seen_width, seen_height) = size, limits.fit(*size)
    across, down = seen_width / width, seen_height / height
    return str([round(coordinate * scale, 2) for coordinate, scale in zip(box, (across, down) * 2, strict=True)])


def image_sizes(rows: Dataset) -> list[list[tuple[int, int]]]:
    """Width and height of every row's images, from their headers.

    Raises:
        InputError: one is no image, or is cut off.
    """
    from datasets import Image, List

    column = "images" if "images" in rows.column_names else "image"
    raw = (
        rows.with_format(None)
        .select_columns([column])
        .cast_column(column, List(Image(decode=False)) if column == "images" else Image(decode=False))
    )
    measured = raw.map(
        _header_sizes, input_columns=[column], remove_columns=[column], with_indices=True, desc="measuring images"
    )
    return [[(width, height) for width, height in sizes] for sizes in measured["sizes"]]


def _header_sizes(images: Any, index: int) -> dict[str, list[list[int]]]:
    sizes = []
    for image in images if isinstance(images, list) else [images]:
        row = f"of row {index} (from 0, of the rows with an image and an answer)"
        size, _ = look_at(image, name=row if image["bytes"] else str(image["path"]))
        sizes.append(list(size))
    return {"sizes": sizes}


def _without_images(rows: Dataset) -> Dataset:
    return rows.select_columns([name for name in rows.column_names if name not in ("image", "images")])


def _processed_length(row: dict[str, Any], processor: Any) -> int:
    from trl.data_utils import prepare_multimodal_messages

    images = row["images"] if "images" in row else [row["image"]]
    messages = prepare_multimodal_messages(row["prompt"], images=images)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return int(processor(text=[text], images=[images], return_tensors="pt")["input_ids"].shape[1])


def longest_prompt(rows: Dataset, processor: Any, *, looked_at: int = 20_000) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the most that a row's images take: (prompt, images).

    All images are measured (20,000 rows take three to six seconds; of more, as many spread over them all). Only
    the prompts that are heaviest, in bytes of text and tokens of images, are tokenised.
    """
    limits = pixel_limits(processor)
    if len(rows) > looked_at:
        rows = rows.select(range(0, len(rows), math.ceil(len(rows) / looked_at)))
    # Without the transform that resizes: what is measured are the images as they are published.
    shown, rows = rows, rows.with_format(None)
    sizes = image_sizes(rows) if limits is not None else [[]] * len(rows)
    images = [0 if limits is None else sum(limits.tokens(*size) for size in row_sizes) for row_sizes in sizes]
    texts = [_text_bytes(row["prompt"]) for row in rows.select_columns(["prompt"])]
    weights = [text / _BYTES_A_TOKEN + image for text, image in zip(texts, images, strict=True)]
    heaviest = sorted(range(len(rows)), key=weights.__getitem__, reverse=True)
    if limits is None:  # Another family's processor: slow, so few.
        return max(_processed_length(shown[index], processor) for index in heaviest[:8]), 0
    tokenised = heaviest[:_TOKENISED]
    prompts = rows.select_columns(["prompt"]).select(tokenised)
    lengths = [
        prompt_length(row["prompt"], sizes[index], processor, limits)
        for index, row in zip(tokenised, prompts, strict=True)
    ]
    return max(lengths), max(images)


def _text_bytes(prompt: list[dict[str, Any]]) -> int:
    """Of a prompt's messages, whose content is text or a list of parts."""
    contents = [message["content"] for message in prompt]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [{"text": content}])]
    return sum(len((part.get("text") or "").encode()) for part in parts)
