"""The reward that values the form of an answer, for a check that an export earns what the trained model does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.model.generation.generate import Record

    Score = Callable[[Sequence[Record]], list[float]]


def format_reward_of(trainer: Any) -> Callable[..., list[float]] | None:
    """Return the trainer's own reward function that judges the form of an answer, known by its name, or None."""
    functions = getattr(trainer, "reward_funcs", None) or []
    named = [function for function in functions if "format" in getattr(function, "__name__", "")]
    return named[0] if named else None


def format_scores(reward: Callable[..., list[float]] | None, processor: Any) -> dict[str, Score]:
    """Return a reward function, as trainers call it (completions in chat form), as a score of records; {} without."""
    if reward is None or processor is None:
        return {}
    tokenizer = getattr(processor, "tokenizer", processor)

    def score(records: Sequence[Record]) -> list[float]:
        texts = [tokenizer.decode(record.tokens, skip_special_tokens=True) for record in records]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return [float(value) for value in reward(completions=completions)]

    return {"format reward": score}
