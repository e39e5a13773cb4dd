"""The end of an answer's thinking: `<think>...</think>` and `<answer>...</answer>`, found in pieces of text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

THINK: Final = ("<think>", "</think>")
ANSWER: Final = "<answer>"


def count_thinking(pieces: Sequence[str]) -> int:
    """Return how many pieces come before the answer; all of them where it never begins.

    The answer begins after `<answer>`; without that marker after `</think>`; where nothing thinks, at once. One that
    opens `<think>` and never closes it has no answer. Markers count as thinking: they are what stands before the first
    piece that a reader waits for.

    Args:
        pieces: the text of every token, or every piece of text that a server sent.
    """
    text = "".join(pieces)
    marker = ANSWER if ANSWER in text else THINK[1] if THINK[1] in text else None
    if marker is None:
        return len(pieces) if text.lstrip().startswith(THINK[0]) else 0
    begins = text.index(marker) + len(marker)
    ends = list(accumulate(map(len, pieces)))
    return next((index for index, end in enumerate(ends) if end > begins), len(pieces))
