"""Prompts as a training has them, in its rows or its own log, and the reward that values the form of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.model.generation.generate import Record


def format_reward_of(trainer: Any) -> Callable[..., list[float]] | None:
    """The trainer's own reward function that judges the form of an answer, told by its name."""
    functions = getattr(trainer, "reward_funcs", None) or []
    named = [function for function in functions if "format" in getattr(function, "__name__", "")]
    return named[0] if named else None


def scored_by(reward: Callable[..., list[float]], processor: Any) -> Callable[[Sequence[Record]], list[float]]:
    """A reward function as trainers call it (completions in chat form), asked about records."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def score(records: Sequence[Record]) -> list[float]:
        texts = [tokenizer.decode(record.tokens, skip_special_tokens=True) for record in records]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return [float(value) for value in reward(completions=completions)]

    return score
