"""The rows that a trainer trains on, wherever it keeps them, read as prompts with their images.

Trainers differ in where their rows lie and in how a row is written: TRL's GRPO rows have `prompt` and `image` or
`images`, SFT rows `messages` and `images`, VLM-R1's `prompt` and `image_path`. transformers 4.49 gives its callbacks
no dataloader; there it lies in the trainer's state.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROMPT_COLUMNS: Final = ("prompt", "messages")
IMAGE_COLUMNS: Final = ("images", "image", "image_path", "image_paths")


def trainer_datasets(kwargs: Mapping[str, Any], state: Any = None) -> Iterator[Any]:
    """Yield the datasets of a trainer that can be read by index, the evaluation's first.

    Args:
        kwargs: what the trainer gives its callbacks.
        state: its `TrainerState`.
    """
    loaders = [kwargs.get("eval_dataloader"), kwargs.get("train_dataloader"), getattr(state, "train_dataloader", None)]
    for loader in loaders:
        dataset: Any = getattr(loader, "dataset", None)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
            yield dataset


def prompt_of(row: Any) -> Any:
    """Return a row's prompt, a text or chat messages; None where it has none."""
    if not hasattr(row, "get"):
        return None
    return next((row[name] for name in PROMPT_COLUMNS if row.get(name)), None)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return a row's images, opened; they may be images, paths, or what `datasets` stores of one.

    Raises:
        OSError: a path leads nowhere.
    """
    beside: Any = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), [])
    return [opened(image) for image in (beside if isinstance(beside, (list, tuple)) else [beside])]


def opened(image: Any) -> Any:
    """Return an image that may be given as a path, or as the bytes and path that `datasets` stores.

    Raises:
        OSError: a path leads nowhere.
    """
    from PIL import Image

    source = image
    if isinstance(image, dict):
        source = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(source, str):
        source = source.removeprefix("file://")
    return Image.open(source).convert("RGB") if isinstance(source, (str, io.BytesIO)) else source
