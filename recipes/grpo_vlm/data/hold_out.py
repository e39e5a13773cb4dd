"""Rows held out of a dataset that publishes none: their images are in no row that is trained on.

Several questions are often asked about one image (in RefCOCO some three expressions). A row that is held out while
another with its image is trained on measures memory along with skill. So rows that share an image, directly or through
others, go together.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def hold_out(pictures: Sequence[Sequence[str]], *, size: int, seed: int) -> list[int]:
    """Choose rows to hold out, in order, such that no picture is in one of them and in another row.

    Args:
        pictures (`Sequence[Sequence[str]]`):
            Of each row, what its images are known by.
        size (`int`):
            The most rows to hold out. As many are as whole groups allow; where the smallest group has more, it is
            that group.
        seed (`int`):
            Of the order in which groups are taken.

    Returns:
        `list[int]`; empty where all rows belong together.
    """
    groups = groups_by_picture(pictures)
    if len(groups) < 2:
        return []
    random.Random(seed).shuffle(groups)
    size = max(size, min(map(len, groups)))
    sums = _sums(groups, size)
    left, chosen = sums[0].bit_length() - 1, []
    for group, rest in zip(groups, sums[1:], strict=True):
        if len(group) <= left and rest >> (left - len(group)) & 1:
            chosen += group
            left -= len(group)
    return sorted(chosen)


def groups_by_picture(pictures: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group rows that share pictures, directly or through others."""
    parent: dict[str, str] = {}

    def find(picture: str) -> str:
        while parent.setdefault(picture, picture) != picture:
            parent[picture] = parent[parent[picture]]
            picture = parent[picture]
        return picture

    for first, *others in pictures:
        for other in others:
            parent[find(other)] = find(first)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(pictures):
        groups.setdefault(find(row[0]), []).append(index)
    return list(groups.values())


def shared(held_out: Sequence[Sequence[str]], trained: Sequence[Sequence[str]]) -> int:
    """Count the rows held out that show a picture which is trained on."""
    known = {picture for row in trained for picture in row}
    return sum(not known.isdisjoint(row) for row in held_out)


def _sums(groups: Sequence[Sequence[int]], size: int) -> list[int]:
    """Return how many rows each group and those behind it can make up, at most `size`: bit n stands for n."""
    sums = [1]
    for group in reversed(groups):
        reached = (sums[-1] | sums[-1] << len(group)) & ((1 << size + 1) - 1)
        sums.append(sums[-1] if reached == sums[-1] else reached)  # the same number, not a copy
    return sums[::-1]
