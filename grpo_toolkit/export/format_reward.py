"""Prompts as a training has them, in its rows or its own log, and the reward that values the form of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.generation.generate import Record, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def logged_requests(trainer: Any, *, limit: int = 4, max_new_tokens: int = 64) -> list[Request]:
    """The last prompts that a trainer has logged, each once; none where it keeps no such log.

    TRL's GRPOTrainer has kept it in `_logs` since 0.16, images inside the prompts or beside them
    (https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/grpo_trainer.py).
    """
    logs = getattr(trainer, "_logs", None)
    if not isinstance(logs, dict) or "prompt" not in logs:
        return []
    prompts = list(logs["prompt"])
    images = list(logs.get("images") or [])
    images = images if len(images) == len(prompts) else [()] * len(prompts)
    found: dict[str, Request] = {}
    for prompt, beside in zip(reversed(prompts), reversed(images), strict=True):
        request = request_of(prompt, beside, max_new_tokens=max_new_tokens)
        found.setdefault(f"{request.messages} {[id(image) for image in request.images]}", request)
    return list(found.values())[:limit]


def request_of(prompt: Any, beside: Any = (), *, max_new_tokens: int) -> Request:
    """A request from a prompt as TRL's trainers take it.

    Args:
        prompt: a text, or chat messages, whose parts may hold their images.
        beside: the image or images beside it, where there are none inside.
        max_new_tokens: of the request.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    inside: list[Any] = []
    messages = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            inside += [part["image"] for part in content if part.get("image") is not None]
            content = [{key: value for key, value in part.items() if key in ("type", "text")} for part in content]
        messages.append({**turn, "content": content})
    images = inside or (beside if isinstance(beside, (list, tuple)) else [beside] if beside is not None else [])
    return Request(messages=messages, images=images, max_new_tokens=max_new_tokens)


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
