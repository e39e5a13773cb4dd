"""Long lists of tensor names in a few words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def summarised(names: Iterable[str], *, most: int = 4) -> str:
    """Return many names in a few words: numbered ones as one pattern each, such as `layers.{0, 1}.mlp.up_proj`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"(?<=\.)[0-9]+(?=\.)", name)
        pattern = name if number is None else f"{name[: number.start()]}\0{name[number.end() :]}"
        groups.setdefault(pattern, []).append(number.group() if number else "")
    shown = [pattern.replace("\0", _together(numbers)) for pattern, numbers in list(groups.items())[:most]]
    rest = sum(map(len, groups.values())) - sum(map(len, list(groups.values())[:most]))
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _together(numbers: Sequence[str]) -> str:
    distinct = sorted(set(numbers), key=int) if all(numbers) else []
    if len(distinct) < 2:
        return "".join(distinct)
    return "{" + (", ".join(distinct) if len(distinct) <= 4 else f"{distinct[0]}, ..., {distinct[-1]}") + "}"
