"""Requests in the forms that people have them in: a question, a file, rows of a dataset, chat messages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.model.generation.request import Request, request_of, requests_from_rows

MOST: Final = 10_000
"""Rows that are read at most."""


def requests_of(given: object) -> list[Request]:
    """Return requests of whatever asks for them.

    Args:
        given: a question; a file of JSON lines (`prompt`, a text or chat messages, and optionally `image`, a path
            beside the file); rows of a dataset; chat messages; requests. A text that ends in .jsonl is a file.

    Raises:
        InputError: none of these, or a file that cannot be read.
    """
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".jsonl")):
        return requests_from_rows(prompt_rows(Path(given), str(given)), limit=MOST)
    if isinstance(given, str):
        return [request_of(given, max_new_tokens=64)]
    if isinstance(given, Request):
        return [given]
    items: list[Any] = []
    if isinstance(given, Iterable):
        items = [given] if isinstance(given, Mapping) else list(given)
    if items and all(isinstance(item, Request) for item in items):
        return items
    if items and all(isinstance(item, str) for item in items):
        return [request_of(item, max_new_tokens=64) for item in items]
    if items and all(isinstance(item, Mapping) and "role" in item for item in items):
        return [request_of(items, max_new_tokens=64)]
    if items and all(isinstance(item, Mapping) and "prompt" in item for item in items):
        return requests_from_rows(items, limit=MOST)
    raise InputError(
        f"requests are {type(given).__name__}; expected a text, a file of JSON lines, rows with a prompt, chat "
        "messages, or grpo_toolkit.Request"
    )


def prompt_rows(path: Path, where: str) -> list[dict[str, Any]]:
    """Read rows of a file of JSON lines, with their images.

    Raises:
        InputError: it cannot be read, has a line without a prompt, or no line; the message begins with `where`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
            raise InputError(f'{where}: line {number} has no "prompt" (a text, or chat messages)')
        if row.get("image") is not None:
            row["image"] = read_image(path.parent / str(row["image"]), f"{where}: line {number}")
        rows.append(row)
    if not rows:
        raise InputError(f"{where}: holds no prompts")
    return rows


def read_image(path: Path, where: str) -> Any:
    """Read an image as RGB.

    Raises:
        InputError: it cannot be read as one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{where} {path}: cannot be read as an image ({error})") from error
