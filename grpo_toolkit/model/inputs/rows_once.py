"""The rows of a dataset, read once for all the times that a trainer asks for them.

TRL reads the rows of a whole rollout for each micro-batch, and each row as often as it has completions: 512 readings
of eight rows for 64 completions, each of which decodes the row's image.

This module imports `datasets` where it stands, since TRL takes nothing that is not a `Dataset`: import it where it is
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from datasets import Dataset

from grpo_toolkit.errors import InputError
from grpo_toolkit.model.inputs.kept import Kept, UnknownValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BYTES: Final = 1 << 29
"""Bytes of rows that are kept: images of one rollout, decoded (0.9 MB at 640 x 480)."""

_PLAIN: Final = (str, bytes, int, float, bool, type(None))


class RowsOnce(Dataset):  # type: ignore[misc]
    """A dataset that keeps the rows which were read last. Every reading gets a copy: a reward may draw into its image.

    Where it is selected from, mapped or given another format, the result reads for itself.
    """

    rows_kept: Kept[Any]

    def __getitem__(self, key: Any) -> Any:
        if type(key) is not int:
            return super().__getitem__(key)
        return self._kept("one", [key], lambda keys: [super(RowsOnce, self).__getitem__(keys[0])])[0]

    def __getitems__(self, keys: list[int]) -> list[Any]:
        return self._kept("many", keys, super().__getitems__)

    def __copy__(self) -> RowsOnce:
        """Return a shallow copy, which reads for itself: it may be given another format."""
        other = object.__new__(RowsOnce)
        other.__dict__.update(self.__dict__)
        other.rows_kept = Kept(self.rows_kept.max_bytes)
        return other

    def set_format(self, *args: Any, **kwargs: Any) -> None:
        """Set the format, in which all rows are read anew."""
        self.rows_kept.clear()
        super().set_format(*args, **kwargs)

    def _kept(self, way: str, keys: Sequence[int], read: Any) -> list[Any]:
        """Return a copy of each row, read now if it is not kept; `way`: read alone a row may have another form."""
        found = {key: self.rows_kept.get((way, key)) for key in dict.fromkeys(keys)}
        missing = [key for key, row in found.items() if row is None]
        if missing:
            for key, row in zip(missing, read(missing), strict=True):
                found[key] = row
                try:
                    kept, size = copied(row)
                except UnknownValueError:
                    return list(read(list(keys)))
                self.rows_kept.put((way, key), kept, size)
        return [copied(found[key])[0] for key in keys]


def rows_once(dataset: Dataset, *, max_bytes: int = MAX_BYTES) -> Dataset:
    """Return the dataset with each row read, and its images decoded, once for all readings of a rollout.

        trainer = GRPOTrainer(..., train_dataset=rows_once(dataset))

    The rows are the same, in the format or through the transform that the dataset has; one that draws random numbers
    then gives all completions of a prompt the same picture. Images are copied for each reading, without the name of
    the file format that they were read from.

    Args:
        dataset (`Dataset`):
            A map-style dataset; it is left as it is, and shares its data with the result.
        max_bytes (`int`, *optional*, defaults to 512 MiB):
            The most memory that kept rows may take, in each process that reads. It should hold the rows of a rollout.

    Raises:
        InputError: it is no map-style dataset of the `datasets` library.
    """
    import copy

    if not isinstance(dataset, Dataset):
        raise InputError(f"rows_once takes a datasets.Dataset, not a {type(dataset).__name__}")
    once: Any = copy.copy(dataset)
    if not isinstance(dataset, RowsOnce):
        once.__class__ = RowsOnce
    once.rows_kept = Kept(max_bytes)
    return once


def copied(value: Any) -> tuple[Any, int]:
    """Return a copy of what a row holds, and about how many bytes that has.

    Raises:
        UnknownValueError: there is something in it of which it is not known how it is copied.
    """
    import numpy as np
    import torch
    from PIL.Image import Image

    if isinstance(value, _PLAIN):
        return value, len(value) if isinstance(value, (str, bytes)) else 8
    if isinstance(value, Image):
        copy = value.copy()
        return copy, copy.width * copy.height * max(1, len(copy.getbands())) * (4 if copy.mode in "IF" else 1)
    if type(value) is dict:
        parts = {name: copied(part) for name, part in value.items()}
        return {name: part for name, (part, _) in parts.items()}, sum(size for _, size in parts.values())
    if type(value) in (list, tuple):
        several = [copied(part) for part in value]
        return type(value)(part for part, _ in several), sum(size for _, size in several)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy(), value.nbytes
    if type(value) is torch.Tensor and value.device.type == "cpu":
        return value.clone(), value.numel() * value.element_size()
    raise UnknownValueError(type(value).__name__)
