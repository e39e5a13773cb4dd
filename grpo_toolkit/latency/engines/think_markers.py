"""The end of an answer's thinking: `<think>...</think>` and `<answer>...</answer>`, found in pieces of text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

THINK: Final = ("<think>", "</think>")
ANSWER: Final = "<answer>"


@dataclass(frozen=True, kw_only=True)
class SplitAnswer:
    """The numbers of pieces that think and that answer, and the first that answers (None: it never got there).

    Markers count as thinking: they are what stands before the first piece that a reader waits for.
    """

    think: int
    answer: int
    first_answer: int | None


def split_answer(pieces: Sequence[str]) -> SplitAnswer:
    """Split an answer at its markers.

    The answer begins after `<answer>`; without that marker after `</think>`; where nothing thinks, at once. One that
    opens `<think>` and never closes it has no answer.

    Args:
        pieces: the text of every token, or every piece of text that a server sent.
    """
    text = "".join(pieces)
    marker = ANSWER if ANSWER in text else THINK[1] if THINK[1] in text else None
    if marker is None:
        if text.lstrip().startswith(THINK[0]):
            return SplitAnswer(think=len(pieces), answer=0, first_answer=None)
        return SplitAnswer(think=0, answer=len(pieces), first_answer=0 if pieces else None)
    begins = text.index(marker) + len(marker)
    ends = list(accumulate(map(len, pieces)))
    first = next((index for index, end in enumerate(ends) if end > begins), len(pieces))
    return SplitAnswer(think=first, answer=len(pieces) - first, first_answer=first if first < len(pieces) else None)
