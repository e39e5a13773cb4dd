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
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from PIL.Image import Image

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How whole files of a format end: no pixels can look like it. Other formats are rare, and decoded."""

_TAIL = 64  # Bytes in which the end is looked for: some writers pad.


def look_at(picture: dict[str, Any], *, name: str) -> tuple[tuple[int, int], str]:
    """Width and height of a picture as `decode` returns it, and what is its own: the digest of its bytes, or its path.

    Args:
        picture (`dict`):
            `bytes` or `path`, as an `Image(decode=False)` column has it.
        name (`str`):
            What to call it in an error.

    Raises:
        InputError: it cannot be read as an image, or is cut off.
    """
    from PIL import Image as Pillow

    content = picture["bytes"]
    try:
        with io.BytesIO(content) if content is not None else Path(picture["path"]).open("rb") as file:
            with Pillow.open(file) as opened:
                size = _upright_size(opened)
                whole = _ends(file, opened.format)
            if not whole:
                decode(picture)
    except _unreadable() as error:
        raise InputError(f"image {name}: {_complaint(error)}; replace it, or take its row out") from error
    if content is None:
        return size, str(picture["path"])
    return size, hashlib.sha1(content, usedforsecurity=False).hexdigest()


def decode(picture: dict[str, Any]) -> Image:
    """The pixels of a picture in RGB, turned as its EXIF says.

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
    """Make an `InputError`, which says which picture it is, of what `decode` raises in the middle of a training."""
    try:
        yield
    except _unreadable() as error:
        raise InputError(
            f"image {name}: {_complaint(error)}; replace it, or take its row out, and go on from the last checkpoint "
            "with --resume_from_checkpoint true"
        ) from error


def _upright_size(opened: Image) -> tuple[int, int]:
    """Width and height as `decode` returns the picture: cameras write it lying and its orientation beside it."""
    from PIL.ExifTags import Base

    # Not asked of other PNGs: Pillow would decode them, as it may also stand behind the pixels.
    if opened.format == "PNG" and "exif" not in opened.info:
        return opened.size
    width, height = opened.size
    return (height, width) if opened.getexif().get(Base.Orientation, 1) >= 5 else (width, height)


def _ends(file: BinaryIO, kind: str | None) -> bool:
    end = _ENDS.get(kind or "")
    if end is None:
        return False
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _TAIL))
    return end in file.read()


def _unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for what it cannot read (its `UnidentifiedImageError` is an OSError)."""
    from PIL.Image import DecompressionBombError

    return OSError, SyntaxError, ValueError, DecompressionBombError


def _complaint(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "cannot be read as an image"
    return f"cannot be read as an image ({' '.join(str(error).split())})"
