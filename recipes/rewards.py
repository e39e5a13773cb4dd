"""Two rule-based rewards for the `<think>...</think><answer>...</answer>` format.

GRPO needs no reward model where a rule can judge the text. One rule asks for the *form* (so that an answer
can be found at all), the other for the *content* (so that it is right). They are kept apart because their
curves tell different stories: the format reward saturates early, the accuracy reward is what one trains for.

Both are plain TRL reward functions: called with keyword arguments (the completions, and every other column of
the dataset), they return one float per completion. A policy under training writes anything, so neither may
ever raise on a completion's text, and neither may pay for a guess: two answer blocks are no answer.
"""

from __future__ import annotations

import re
from typing import Any

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>(?P<thought>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)

Completion = str | list[dict[str, Any]]


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


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Pay 1.0 where the whole completion is one thought and then one answer, both non-empty; else 0.0.

    White space around and between the two blocks is allowed, any other text is not.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            The generated texts, plain or conversational.
        **kwargs:
            The other columns, and what the trainer adds; not used.
    """
    return [float(_is_well_formed(_text(completion))) for completion in completions]


def accuracy_reward(completions: list[Completion], answer: list[str], **kwargs: Any) -> list[float]:
    """Pay 1.0 where the one answer block holds the reference answer; else 0.0.

    The two are compared as text, after stripping: `7` equals ` 7 `, not `7.0` and not `seven`.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            The generated texts, plain or conversational.
        answer (`list[str]`):
            The dataset's reference answers, one per completion.
        **kwargs:
            The other columns, and what the trainer adds; not used.
    """
    return [
        float(extract_answer(_text(completion)) == reference.strip())
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _is_well_formed(text: str) -> bool:
    # Counting first keeps a doubled block out, and the match linear: each tag can stand in one place only.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _WHOLE.fullmatch(text)
    return match is not None and bool(match["thought"].strip()) and bool(match["answer"].strip())


def _text(completion: Completion) -> str:
    """The text of a completion in any of the forms that TRL hands to a reward function."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message.get("content") or ""
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(texts)
