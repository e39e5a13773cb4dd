"""The names that a quantised folder's config leaves alone, matched as compressed-tensors matches them.

An entry of `ignore` is a module's name, or a pattern after `re:` that has to fit from the name's beginning on
(https://github.com/vllm-project/compressed-tensors, `match_name`). Folders come from strangers, and a pattern can be
made to take for ever: what is longer or more nested than any published one is not tried. Standard library only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PATTERN: Final = "re:"
_MOST_NAMES: Final = 256
_MOST_PATTERNS: Final = 64
# A repeated group that repeats inside, which backtracks without end: (a+)+, (.*x)*
_NESTED: Final = re.compile(r"[+*}][^()]*\)[+*{]")
_CLASS: Final = re.compile(r"[A-Z]\w*")


def pattern_of(live: str) -> str:
    """Return a pattern for the part of a model in which a layer is, tower or head: its first name under `model`.

    It fits in every reader, whatever prefix that one puts in front.
    """
    part = live.removeprefix("model.").partition(".")[0]
    return rf"{_PATTERN}(?:.*\.)?{re.escape(part)}(?:\..*)?$"


def unlisted(names: Iterable[str], ignore: Sequence[object]) -> list[str] | None:
    """Return the module names that no entry of `ignore` fits; None where that cannot be told from names alone."""
    texts = [entry for entry in ignore if isinstance(entry, str)]
    patterns = [text.removeprefix(_PATTERN) for text in texts if text.startswith(_PATTERN)]
    exact = set(texts)
    if len(patterns) > _MOST_PATTERNS or any(map(_CLASS.fullmatch, exact)) or not all(map(_is_quick, patterns)):
        return None
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except (re.error, RecursionError, OverflowError):
        return None
    return [
        name
        for name in names
        if name not in exact and not (len(name) <= _MOST_NAMES and any(one.match(name) for one in compiled))
    ]


def _is_quick(pattern: str) -> bool:
    return len(pattern) <= 200 and len(re.findall(r"[+*{]", pattern)) <= 3 and not _NESTED.search(pattern)
