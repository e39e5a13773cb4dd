"""Find the answer in a completion, and say how right it is.

A dataset says of each answer what kind of thing it is (`answer_type`), and that decides how two answers are compared:

| kind     | reference        | right is                                                                      |
|----------|------------------|-------------------------------------------------------------------------------|
| `text`   | `Red`            | the same text, but for case and white space                                   |
| `number` | `3`              | the same number, however it is written: `3`, `3.0`, `+3`, `1,000`             |
| `choice` | `B`              | that letter and no other: `B`, `(b)`, `B. A circle`; not `A or B`             |
| `math`   | `2 \\sqrt{221}`   | the same by math-verify, or the same text                                     |
| `box`    | `[8, 3, 91, 60]` | one box that overlaps it by half or more (the usual measure of RefCOCO)       |

A policy under training writes anything: none of this raises on any text, and two answers are no answer.

A base that was asked for the answer alone, without the blocks, is read leniently instead (`is_right_directly`).
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from grpo_vlm.rewards.formulas import same_formula

AnswerType = Literal["text", "number", "choice", "math", "box"]
ANSWER_TYPES: tuple[str, ...] = get_args(AnswerType)

Box = tuple[float, float, float, float]
"""`x1, y1, x2, y2` in pixels of the image as the model sees it, so after the processor has resized it."""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>(?P<thought>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,15})?(?:\.\d{1,15})?", re.ASCII)
_CHOICE = re.compile(r"\(?(?P<letter>[A-Za-z])\)?(?:[.:)]\s*(?P<text>.*))?", re.DOTALL)
# In the text of a choice: "or B", ", B", "/B"; a list, "(A) 3 (B) 4"; nothing but another letter. "A" may be a word.
_ALTERNATIVES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:\b(?:or|and)\s+|[,;/&|]\s*)\(?(?P<letter>[B-H]\b|A\b(?!\s+\w)|A(?=\s+(?:or|and)\b))",
        r"(?<![\w(])\(?(?P<letter>[A-H])[.:)]\s*\w",
        r"^\(?(?P<letter>[A-H])\)?\.?$",
    )
)
_STANDING_LETTER = re.compile(r"(?<![A-Za-z])(?:[B-H]|A(?!\s+[a-z]))(?![A-Za-z])")
_STANDING_NUMBER = re.compile(
    r"(?<![\w.^{/])[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?![\w^/]|[.,]\d)", re.ASCII
)
_LEAD = re.compile(r".*(?:\b(?:is|are|equals)\b|\banswer:|=)\s*:?", re.DOTALL | re.IGNORECASE)
_COORDINATE = r"\s*(-?\d{1,6}(?:\.\d{1,12})?)\s*"
_BOX = re.compile(r"\[" + ",".join([_COORDINATE] * 4) + r"\]", re.ASCII)


def extract_answer(text: str) -> str | None:
    """Return the text of the one answer block, stripped.

    Args:
        text (`str`):
            A whole completion, well-formed or not.

    Returns:
        `str` or `None`: `None` where there is no answer block, or an empty, unclosed or doubled one.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before_close, _, _ = text.partition("</answer>")
    _, opened, answer = before_close.partition("<answer>")
    return (answer.strip() or None) if opened else None


def is_well_formed(text: str) -> bool:
    """Return whether the whole text is one thought and then one answer, both non-empty."""
    # Counting first keeps a doubled block out, and the match linear: each tag can stand in one place only.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _WHOLE.fullmatch(text)
    return match is not None and bool(match["thought"].strip()) and bool(match["answer"].strip())


def is_right(found: str | None, reference: str, answer_type: str = "text") -> bool:
    """Return whether an answer, as `extract_answer` returns it, is the reference.

    Raises:
        ValueError: the dataset names a kind of answer that there is not.
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"answer_type {answer_type!r}: expected one of {', '.join(ANSWER_TYPES)}")
    if found is None:
        return False
    found, reference = found.strip(), reference.strip()
    if answer_type == "text":
        return _folded(found) == _folded(reference)
    if answer_type == "number":
        number = parse_number(found)
        return number is not None and number == parse_number(reference)
    if answer_type == "choice":
        return parse_choice(found) == parse_choice(reference) is not None
    if answer_type == "box":
        return box_overlap(found, reference) >= 0.5
    return same_formula(found, reference)


def is_right_directly(text: str, reference: str, answer_type: str = "text") -> bool:
    """Return whether a text that was asked for the answer alone gives the reference, in whatever words.

    Lenient, unlike `is_right`: a base is not told of a form here, and what it loses to its wording would pass for a
    gain of the training.

    Raises:
        ValueError: the dataset names a kind of answer that there is not.
    """
    if is_right(text.strip() or None, reference, answer_type):
        return True
    form = answer_type
    if answer_type == "text" and parse_number(reference) is not None:
        form = "number"
    elif answer_type == "text" and _STANDING_LETTER.fullmatch(reference.strip()) is not None:
        form = "choice"
    return is_right(find_answer(text, form), reference, answer_type)


def find_answer(text: str, answer_type: str = "text") -> str | None:
    """Find the answer in a text of any form: in its answer block or `\boxed{}`, else the last that it names.

    That is the last number, the last letter of a choice, or of texts and formulas what stands behind the last `is` or
    `=`. None where there is none.
    """
    text = (extract_answer(text) or _boxed(text) or text).replace("**", "")
    if answer_type == "number":
        return next(reversed(_STANDING_NUMBER.findall(text)), None)
    if answer_type == "choice":
        return parse_choice(text) or next(reversed(_STANDING_LETTER.findall(text)), None)
    if answer_type == "box":
        return text.strip() or None
    return _LEAD.sub("", text, count=1).strip(' \n\t`".') or None


def parse_number(text: str) -> float | None:
    """Return the one number that the text is, or None. A dollar sign before and a full stop after it may stand."""
    text = text.strip().strip("$").removesuffix(".").strip()
    if not any(character.isdigit() for character in text) or _NUMBER.fullmatch(text) is None:
        return None
    return float(text.replace(",", ""))


def parse_choice(text: str) -> str | None:
    """Return the one letter chosen, in upper case, or None. The text of its choice may follow."""
    match = _CHOICE.fullmatch(text.strip())
    if match is None:
        return None
    letter = match["letter"].upper()
    others = {found["letter"] for pattern in _ALTERNATIVES for found in pattern.finditer(match["text"] or "")}
    return letter if others <= {letter} else None


def parse_box(text: str) -> Box | None:
    """Return the one box in the text (four numbers, as JSON or not), or None where there is none or several."""
    found = _BOX.findall(text)
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = (float(coordinate) for coordinate in found[0])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def box_overlap(found: str, reference: str) -> float:
    """Return intersection over union of the boxes in two texts, 0 to 1; 0 where either has not exactly one."""
    ours, theirs = parse_box(found), parse_box(reference)
    if ours is None or theirs is None:
        return 0.0
    width = min(ours[2], theirs[2]) - max(ours[0], theirs[0])
    height = min(ours[3], theirs[3]) - max(ours[1], theirs[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(ours) + _area(theirs) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _boxed(text: str) -> str | None:
    """Return what the last `\boxed{}` holds; None where there is none, or it is not closed."""
    _, opened, rest = text.rpartition("\\boxed{")
    depth = 1 if opened else 0
    for position, character in enumerate(rest if opened else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return None


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
