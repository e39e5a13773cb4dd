"""Equal images of a batch, found by their content: the one place that tells them.

In the machine's memory they are compared, word by word. On another device digests of their patches are computed where
the patches are: two hashes of 64 bits a patch row (sums of its words, each times a fixed random odd number, modulo
2^64), mixed with the row's place in its image and added up. One transfer for all images; the host compares 128 bits
each.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

SEEDS: Final = (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51)
SAMPLED_ROWS: Final = 8
"""Rows of an image, from all over it, that tell which others it is worth comparing with."""

ROWS_AT_ONCE_ELEMENTS: Final = 1 << 24
"""Words that are widened to 64 bits at a time: 128 MiB."""


def equal_images(patches: torch.Tensor, grid: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Return the size of each image in rows, and for each the first image that equals it.

    Args:
        patches: the rows of all images one after the other, [rows, ...].
        grid: time, height and width of each image in patches, [images, 3].

    Returns:
        None where the grid does not account for the rows.
    """
    return _compared(patches, grid) if patches.device.type == "cpu" else by_digests(patches, grid)


def by_digests(patches: torch.Tensor, grid: torch.Tensor) -> tuple[list[int], list[int]] | None:
    """Return what `equal_images` does, wherever the patches are."""
    import torch

    with torch.no_grad():
        facts = torch.cat([grid.long(), image_digests(patches, grid)], dim=1).tolist()
    sizes = [time * height * width for time, height, width, *_ in facts]
    if sum(sizes) != patches.shape[0]:
        return None
    first: dict[tuple[int, ...], int] = {}
    return sizes, [first.setdefault(tuple(fact), index) for index, fact in enumerate(facts)]


def equal_rows(field: torch.Tensor) -> list[int]:
    """Return for each row of a field [rows, ...] the first that equals it."""
    import torch

    equal = equal_images(field, torch.ones(field.shape[0], 3, dtype=torch.long, device=field.device))
    assert equal is not None
    return equal[1]


def _compared(patches: torch.Tensor, grid: torch.Tensor) -> tuple[list[int], list[int]] | None:
    import torch

    shapes = grid.tolist()
    sizes = [time * height * width for time, height, width in shapes]
    if sum(sizes) != patches.shape[0]:
        return None
    images = torch.split(_words(patches), sizes)
    first: list[int] = []
    alike: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for index, (shape, words) in enumerate(zip(shapes, images, strict=True)):
        sample = words[:: -(-len(words) // SAMPLED_ROWS) or 1].contiguous().numpy().tobytes()
        candidates = alike.setdefault((tuple(shape), sample), [])
        same = next((one for one in candidates if torch.equal(images[one], words)), None)
        if same is None:
            candidates.append(index)
        first.append(index if same is None else same)
    return sizes, first


def image_digests(patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return two 64-bit digests of each image's patches, [images, 2], without waiting for the device."""
    import torch

    words = _words(patches)
    rows = torch.arange(words.shape[0], device=words.device)
    ends = grid.to(words.device).long().prod(-1).cumsum(0)
    image = torch.searchsorted(ends, rows, right=True).clamp_(max=len(ends) - 1)
    place = rows - torch.cat([ends.new_zeros(1), ends[:-1]])[image]
    step = max(1, ROWS_AT_ONCE_ELEMENTS // max(1, words.shape[1]))
    digests = []
    for seed in SEEDS:
        odd = _mixed(torch.arange(words.shape[1], device=words.device) + seed) | 1
        sums = [(words[at : at + step].long() * odd).sum(1) for at in range(0, len(words), step)]
        row_hashes = _mixed(torch.cat(sums) + _mixed(place + seed))
        digests.append(torch.zeros_like(ends).index_add_(0, image, row_hashes))
    return torch.stack(digests, dim=1)


def spans_of(sizes: list[int], order: list[int]) -> tuple[tuple[int, int], ...]:
    """Return where the images named by `order` lie, as (start, end), when images of these sizes follow each other."""
    ends = list(accumulate(sizes))
    return tuple((ends[index] - sizes[index], ends[index]) for index in order)


def _words(patches: torch.Tensor) -> torch.Tensor:
    import torch

    flat = patches.detach().reshape(patches.shape[0], prod(patches.shape[1:]))
    same_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.contiguous().view(same_width)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014); int64 wraps, and its shifts must be made logical.
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return numbers ^ ((numbers >> 31) & ((1 << 33) - 1))
