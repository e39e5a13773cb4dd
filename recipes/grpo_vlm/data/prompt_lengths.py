"""The real length of each prompt, and the place of its boxes once the image has been resized.

Each row is measured once, when it is loaded; rows are left out, and the plan is made, by what was found then. Sizes
are read from the images' headers: nothing is decoded, and `datasets` keeps the result. Prompts are tokenised many at a
time, and equal ones once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError
from grpo_vlm.data.columns import answer_types
from grpo_vlm.data.image_files import look_at
from grpo_vlm.data.image_sizes import PixelLimits, decoded, pixel_limits, row_images, undecoded
from grpo_vlm.rewards.answers import parse_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

ROW = "row {} (from 0, of the rows with a question, an image and an answer)"
"""The names of a row in an error."""

_TOGETHER = 1000
"""Prompts that are tokenised at a time."""

_TOKENISED = 256
"""Prompts among which the longest is looked for where none is too long."""

_BYTES_A_TOKEN = 3  # About, to tell heavy prompts from light ones: English has four, digits one.

_PROCESSED = 8
"""Prompts among which the longest is looked for where each must be processed for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The images of a row, and the tokens that it takes.

    Attributes:
        sizes: width and height of each image, as it is published.
        pictures: what each image is known by; rows with one in common show the same.
        image_tokens: of the images in the prompt.
        prompt_tokens: of the prompt as the trainer will write it, images included; None where it was not counted.
        too_narrow: whether the processor would refuse an image, or resize it once more.
    """

    sizes: tuple[tuple[int, int], ...]
    pictures: tuple[str, ...]
    image_tokens: int = 0
    prompt_tokens: int | None = None
    too_narrow: bool = False

    def fits(self, max_prompt_length: int | None) -> bool:
        """Return whether the row can be trained on, with a prompt that has at most so many tokens."""
        if self.prompt_tokens is None or max_prompt_length is None:
            return not self.too_narrow
        return not self.too_narrow and self.prompt_tokens <= max_prompt_length


@dataclass(frozen=True, kw_only=True)
class Longest:
    """The tokens of the longest prompt, images included, and the most that a row's images take."""

    prompt_tokens: int
    image_tokens: int


def measure(rows: Dataset, processor: Any, *, every_length: bool) -> list[Measured]:
    """Measure each row.

    Args:
        rows (`Dataset`):
            In the row form, images included.
        processor (*optional*):
            The model's, with the pixel limits of the training. Without it only the images are looked at.
        every_length (`bool`):
            Count the tokens of every prompt, because those that are too long are left out. Otherwise those of the
            heaviest are counted, which tell the longest; where the processor must be given each image for it, none.

    Raises:
        InputError: an image is none, or is cut off; a prompt cannot be written.
    """
    limits = pixel_limits(processor)
    seen = _look_at_images(rows)
    if limits is None:
        processed = decoded(rows) if processor is not None and every_length else None
        lengths = [None] * len(rows) if processed is None else [_processed_length(row, processor) for row in processed]
        return [
            Measured(sizes=sizes, pictures=pictures, prompt_tokens=length)
            for (sizes, pictures), length in zip(seen, lengths, strict=True)
        ]
    narrow = [not all(limits.takes(*size) for size in sizes) for sizes, _ in seen]
    images = [
        0 if refused else sum(limits.tokens(*size) for size in sizes)
        for (sizes, _), refused in zip(seen, narrow, strict=True)
    ]
    prompts = rows["prompt"][:]
    counted = range(len(rows)) if every_length else _heaviest(prompts, images, count=_TOKENISED)
    texts = _text_tokens({index: (prompts[index], len(seen[index][0])) for index in counted}, processor)
    # The chat template has one placeholder for each image.
    return [
        Measured(
            sizes=sizes,
            pictures=pictures,
            image_tokens=images[index],
            prompt_tokens=texts[index] - len(sizes) + images[index] if index in texts else None,
            too_narrow=narrow[index],
        )
        for index, (sizes, pictures) in enumerate(seen)
    ]


def fit_boxes(rows: Dataset, measured: Sequence[Measured], limits: PixelLimits) -> Dataset:
    """Move boxes from the original image's pixels to those of the image as the model sees it.

    Qwen2.5-VL is told of no other size than that of the resized image, and answers in its pixels
    (https://github.com/om-ai-lab/VLM-R1/issues/44).
    """
    if "box" not in answer_types(rows):
        return rows
    answers = [
        fit_box(answer, size=row.sizes[0], limits=limits) if kind == "box" else answer
        for answer, kind, row in zip(rows["answer"], rows["answer_type"], measured, strict=True)
    ]
    return rows.remove_columns("answer").add_column("answer", answers)


def fit_box(answer: str, *, size: tuple[int, int], limits: PixelLimits) -> str:
    """Return one box in the frame of the resized image.

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


def longest_prompt(rows: Dataset, measured: Sequence[Measured], processor: Any) -> Longest:
    """Find the longest of all rows whose length was counted; else of those with the longest texts."""
    lengths = [row.prompt_tokens for row in measured if row.prompt_tokens is not None]
    if not lengths:
        heaviest = _heaviest(rows["prompt"][:], [0] * len(rows), count=_PROCESSED)
        lengths = [_processed_length(row, processor) for row in decoded(rows.select(heaviest))]
    return Longest(prompt_tokens=max(lengths), image_tokens=max(row.image_tokens for row in measured))


def _look_at_images(rows: Dataset) -> list[tuple[tuple[tuple[int, int], ...], tuple[str, ...]]]:
    """Return for every row the sizes of its images, and what each is known by."""
    column = "images" if "images" in rows.column_names else "image"
    images = undecoded(rows.select_columns([column]))
    first = images[0][column]
    options = {
        "input_columns": [column],
        "remove_columns": [column],
        "with_indices": True,
        "desc": "looking at images",
    }
    # Not what was found the last time, where `datasets` knows nothing but the path: the file may be another.
    embedded = (first[0] if isinstance(first, list) else first)["bytes"] is not None
    seen = images.map(_look_at_row, **options, load_from_cache_file=embedded)
    return [(tuple((width, height) for width, height in row["sizes"]), tuple(row["pictures"])) for row in seen]


def _look_at_row(images: Any, index: int) -> dict[str, list[Any]]:
    looked = []
    for image in images if isinstance(images, list) else [images]:
        embedded = image["bytes"] is not None
        looked.append(look_at(image, name=f"of {ROW.format(index)}" if embedded else image["path"]))
    return {"sizes": [size for size, _ in looked], "pictures": [picture for _, picture in looked]}


def _heaviest(prompts: Sequence[Any], images: Sequence[int], *, count: int) -> list[int]:
    """Return the rows with most text and image tokens, by the bytes of the text."""
    weights = [_text_bytes(prompt) / _BYTES_A_TOKEN + image for prompt, image in zip(prompts, images, strict=True)]
    return sorted(range(len(prompts)), key=weights.__getitem__, reverse=True)[:count]


def _text_tokens(asked: dict[int, tuple[list[dict[str, Any]], int]], processor: Any) -> dict[int, int]:
    """Count tokens of prompts, one for each image. `asked`: prompt and images by the number of the row."""
    keys = {index: (repr(prompt), images) for index, (prompt, images) in asked.items()}
    written: dict[tuple[str, int], str] = {}
    for index, (prompt, images) in asked.items():
        if keys[index] in written:
            continue
        try:
            written[keys[index]] = _written(prompt, [None] * images, processor)
        except ValueError as error:  # TRL counts the places for images
            raise InputError(f"{ROW.format(index)}: its prompt cannot be written ({error})") from error
    texts, counted = list(written.values()), []
    for start in range(0, len(texts), _TOGETHER):
        counted += [len(ids) for ids in processor.tokenizer(texts[start : start + _TOGETHER])["input_ids"]]
    found = dict(zip(written, counted, strict=True))
    return {index: found[key] for index, key in keys.items()}


def _written(prompt: list[dict[str, Any]], images: list[Any], processor: Any) -> str:
    """Return the prompt as the trainer will write it."""
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(prompt, images=images)
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _processed_length(row: dict[str, Any], processor: Any) -> int:
    images = row_images(row)
    text = _written(row["prompt"], images, processor)
    return int(processor(text=[text], images=[images], return_tensors="pt")["input_ids"].shape[1])


def _text_bytes(prompt: list[dict[str, Any]]) -> int:
    """Count the bytes of a prompt's messages, whose content is text or a list of parts."""
    contents = [message["content"] for message in prompt]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [{"text": content}])]
    return sum(len((part.get("text") or "").encode()) for part in parts)
