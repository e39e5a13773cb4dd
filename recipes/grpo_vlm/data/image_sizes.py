"""The size in which the model sees an image, and the settings for it.

Qwen2.5-VL resizes every image so that both sides are multiples of 28 pixels and the whole has between `min_pixels`
and `max_pixels`; each 28 x 28 pixels are one token. The published maximum is 12.8 million pixels, 16,384 tokens for
one image: no training fits that, and a processor saved with another limit than the training's makes the export slower
and less accurate. So `--max_pixels` is one number that goes everywhere: the rows are resized to it (rollouts in vLLM
then see the same image as the training forward, whatever their own processor's limits), and the processor that is
trained with and saved has it too. `--min_pixels` goes the same way, for figures too small to read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError
from grpo_vlm.data.image_files import decode, told_by_name

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class PixelLimits:
    """The range of pixels to which a processor brings images, in squares of `factor` pixels that become one token."""

    factor: int
    min_pixels: int
    max_pixels: int

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the image as the model sees it, in pixels.

        Raises:
            ValueError: the image is too narrow for this processor.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        rows, columns = smart_resize(
            height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return columns, rows

    def tokens(self, width: int, height: int) -> int:
        """Return how many tokens the image takes in the prompt."""
        fitted_width, fitted_height = self.fit(width, height)
        return fitted_width * fitted_height // self.factor**2

    def takes(self, width: int, height: int) -> bool:
        """Return whether the processor leaves an image of this size, brought to it before, as it is.

        It refuses one more than 200 times as long as wide, in the middle of a training, and resizes some narrow ones
        once more.
        """
        try:
            size = self.fit(width, height)
            return self.fit(*size) == size
        except ValueError:
            return False

    def largest_minimum(self) -> int:
        """Return the most that `min_pixels` may be for `fit` to give sizes that it leaves as they are.

        It rounds an enlarged image's sides up to squares, and a reduced one's down: limits nearer than that would
        have the processor resize once more what was resized for it. For images up to four times as long as wide,
        whose sides add up to 2.5 times the root of their pixels.
        """
        return int(self.max_pixels - 2.5 * self.factor * math.sqrt(self.max_pixels) - self.factor**2)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A transform for `datasets`: the images of a batch, decoded, and in the size in which the model sees them.

    Columns must be of `Image(decode=False)`: where `datasets` decodes, a damaged image is a traceback without a name.

    Attributes:
        limits: how large the model sees images; None leaves them as they are.
    """

    limits: PixelLimits | None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        fitted = dict(batch)
        for column in {"image", "images"} & set(batch):
            asked = batch.get("prompt", [None] * len(batch[column]))
            fitted[column] = [self._fit(row, prompt) for row, prompt in zip(batch[column], asked, strict=True)]
        return fitted

    def _fit(self, row: Any, prompt: list[dict[str, Any]] | None) -> Any:
        if isinstance(row, list):
            return [self._fit(picture, prompt) for picture in row]
        with told_by_name(_name(row, prompt)):
            return _fitted(row, self.limits)


def _fitted(picture: dict[str, Any], limits: PixelLimits | None) -> Image:
    """Return an image decoded and in its size."""
    from PIL import Image as Pillow

    image = decode(picture)
    size = image.size if limits is None else limits.fit(*image.size)
    return image if image.size == size else image.resize(size, Pillow.Resampling.BICUBIC)


def undecoded(rows: Dataset) -> Dataset:
    """Return the row form with images as `bytes` or a `path`; rows that are so already are not cast and copied."""
    from datasets import Image, List

    one = Image(mode="RGB", decode=False)
    column, kept = ("images", List(one)) if "images" in rows.column_names else ("image", one)
    rows = rows.with_format(None)
    return rows if rows.features[column] == kept else rows.cast_column(column, kept)


def decoded(rows: Dataset, limits: PixelLimits | None = None) -> Dataset:
    """Return the row form with images that are decoded when they are asked for, and brought within the limits."""
    return undecoded(rows).with_transform(Fit(limits=limits))


def row_images(row: dict[str, Any]) -> list[Any]:
    """Return the images of a row, which has one or several."""
    return row["images"] if "images" in row else [row["image"]]


def _name(picture: dict[str, Any], prompt: list[dict[str, Any]] | None) -> str:
    """Name a row by its path and question: rows were left out and shuffled, so that a number would say little."""
    asked = f" of the row that asks {str(prompt[-1]['content'])[:200]!r}" if prompt else ""
    return f"{picture['path'] or ''}{asked}".strip() or "of an unknown row"


def load_processor(
    name: str, *, revision: str | None = None, min_pixels: int | None = None, max_pixels: int | None = None
) -> Any:
    """Load the model's processor (or tokenizer) as TRL would, with the pixel limits asked for.

    Raises:
        InputError: it cannot be loaded, has no pixel limits to set, or the limits leave no room for images.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, truncation_side="left", padding_side="left")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model {name}: its processor cannot be loaded ({reason})") from error
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    flags = " ".join(f"--{limit} {pixels}" for limit, pixels in asked.items() if pixels is not None)
    if flags:
        own = pixel_limits(processor)
        if own is None:
            raise InputError(f"{flags}: the processor of {name} has no such limit; leave it out")
        limits = replace(own, **{limit: pixels for limit, pixels in asked.items() if pixels is not None})
        _check_limits(limits, name=name, given=min_pixels is not None)
        processor.image_processor.size = {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    return processor


def _check_limits(limits: PixelLimits, *, name: str, given: bool) -> None:
    """Refuse limits between which images have no size. `given`: whether the lower one was asked for.

    Raises:
        InputError: they are in the wrong order, or too near.
    """
    least = max(limits.min_pixels, limits.factor**2)
    if not given:
        if limits.max_pixels < least:
            raise InputError(f"--max_pixels {limits.max_pixels}: {name} takes no image smaller than {least} pixels")
        return
    most = limits.largest_minimum()
    if not 1 <= limits.min_pixels <= most:
        ways = f"set 1 to {most}, or raise --max_pixels" if most >= 1 else "raise --max_pixels"
        raise InputError(
            f"--min_pixels {limits.min_pixels}: images have at most {limits.max_pixels} pixels (--max_pixels, or the "
            f"limit of {name}), and one brought up to the minimum must not exceed that, its sides whole squares of "
            f"{limits.factor} pixels; {ways}"
        )


def pixel_limits(processor: Any) -> PixelLimits | None:
    """Return the limits of a Qwen-VL processor; None for one that resizes in another way, and for a tokenizer."""
    image_processor = getattr(processor, "image_processor", None)
    if not hasattr(image_processor, "merge_size") or not hasattr(image_processor, "patch_size"):
        return None
    size = dict(image_processor.size)
    return PixelLimits(
        factor=image_processor.patch_size * image_processor.merge_size,
        min_pixels=int(size["shortest_edge"]),
        max_pixels=int(size["longest_edge"]),
    )
