"""Pictures as `datasets` keeps them, bytes or a path: what their headers say, whether they are whole, their pixels.

A picture that cannot be decoded would end a training in the middle. So at the start each is opened, and its end looked
for: that takes no longer than reading the file, where decoding takes thirty times as long (20,000 JPEGs of 72 kB on
one core: 2 s, and 69 s). Only those that do not end as their format does are decoded, which decides: a file may have
more behind its end. What this misses is damage in the middle, rare beside files that were cut off; it is met when the
row is trained on and is then one line that names the picture. It stops the run, whose last checkpoint can be resumed
once the row is mended: any other image in its place would train on a question that has no answer.
"""

from __future__ import annotations

import hashlib
import io
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of whole files of a format: no pixels can look like it. Other formats are rare, and decoded."""

_ABOUT_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
"""The chunk of a PNG that has its orientation, if it has one."""

_LYING = (5, 6, 7, 8)
"""Orientations, of EXIF's eight, whose width is the upright picture's height."""

_TAIL = 64  # Bytes in which the end is looked for: some writers pad.


def look_at(picture: dict[str, Any], *, name: str) -> tuple[tuple[int, int], str]:
    """Return width and height of a picture as `decode` returns it, and the digest of its bytes.

    Args:
        picture (`dict`):
            `bytes` or `path`, as an `Image(decode=False)` column has it.
        name (`str`):
            What to call it in an error.

    Raises:
        InputError: it cannot be read as an image, or is cut off.
    """
    from PIL import Image as Pillow

    try:
        encoded = _content(picture)
        with Pillow.open(io.BytesIO(encoded)) as opened:
            size = _upright_size(opened)
            end = _ENDS.get(opened.format or "")
        if end is None or end not in encoded[-_TAIL:]:
            decode(picture)
    except _unreadable() as error:
        raise InputError(f"image {name}: {_complaint(error)}; replace it, or take its row out") from error
    return size, hashlib.sha1(encoded, usedforsecurity=False).hexdigest()


def _content(picture: dict[str, Any]) -> bytes:
    """Return the encoded picture, which is in the dataset or in a file of its own."""
    embedded: bytes | None = picture["bytes"]
    return Path(picture["path"]).read_bytes() if embedded is None else embedded


def decode(picture: dict[str, Any]) -> Image:
    """Return the pixels of a picture in RGB, turned as its EXIF says.

    Args:
        picture (`dict`):
            `bytes` or `path`, as an `Image(decode=False)` column has it.

    Raises:
        OSError, SyntaxError, ValueError: it is damaged; see `told_by_name`.
    """
    from datasets import Image as ImageFeature

    return ImageFeature(mode="RGB").decode_example(picture)


@contextmanager
def told_by_name(name: str) -> Iterator[None]:
    """Turn what `decode` raises in the middle of a training into an `InputError` that names the picture."""
    try:
        yield
    except _unreadable() as error:
        raise InputError(
            f"image {name}: {_complaint(error)}; replace it, or take its row out, and go on from the last checkpoint "
            "with --resume_from_checkpoint true"
        ) from error


def _upright_size(opened: Image) -> tuple[int, int]:
    """Return width and height as `decode` turns the picture: cameras store it lying, its orientation beside it.

    Pillow turns a TIFF as it opens it. Of PNGs only those are asked that say so before their pixels: to look behind
    them, Pillow would decode them all.
    """
    from PIL.ExifTags import Base

    width, height = opened.size
    if opened.format == "TIFF" or (opened.format == "PNG" and not _ABOUT_PNG & opened.info.keys()):
        return width, height
    return (height, width) if opened.getexif().get(Base.Orientation) in _LYING else (width, height)


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the errors that Pillow raises for what it cannot read (its `UnidentifiedImageError` is an OSError)."""
    from PIL.Image import DecompressionBombError

    return OSError, SyntaxError, ValueError, DecompressionBombError


def _complaint(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "cannot be read as an image"
    return f"cannot be read as an image ({' '.join(str(error).split())})"
