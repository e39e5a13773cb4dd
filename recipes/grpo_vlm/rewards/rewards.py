"""The rewards: rules that judge a completion of the form `<think>...</think><answer>...</answer>`.

GRPO needs no reward model where a rule can judge the text. One rule asks for the *form* (so that an answer
can be found at all), another for the *content* (so that it is right). They are kept apart because their
curves tell different stories: the format reward saturates early, the accuracy reward is what one trains for.

All are plain TRL reward functions: called with keyword arguments (the completions, and every other column of
the dataset), they return one float per completion. A policy under training writes anything, so none may
ever raise on a completion's text, and none may pay for a guess: two answer blocks are no answer.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_toolkit import InputError
from grpo_vlm.rewards.answers import box_overlap, extract_answer, is_right, is_well_formed

Completion = str | list[dict[str, Any]]
RewardFunction = Callable[..., list[float]]


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Pay 1.0 where the whole completion is one thought and then one answer, both non-empty; else 0.0.

    White space around and between the two blocks is allowed, any other text is not.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            The generated texts, plain or conversational.
        **kwargs:
            The other columns, and what the trainer adds; not used.
    """
    return [float(is_well_formed(completion_text(completion))) for completion in completions]


def accuracy_reward(
    completions: list[Completion], answer: list[str], answer_type: list[str] | None = None, **kwargs: Any
) -> list[float]:
    """Pay 1.0 where the one answer block holds the reference answer; else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            The generated texts, plain or conversational.
        answer (`list[str]`):
            The dataset's reference answers, one per completion.
        answer_type (`list[str]`, *optional*):
            How each is compared, see `answers.py`; as texts by default.
        **kwargs:
            The other columns, and what the trainer adds; not used.
    """
    kinds = answer_type if answer_type is not None else ["text"] * len(answer)
    return [
        float(is_right(extract_answer(completion_text(completion)), reference, kind))
        for completion, reference, kind in zip(completions, answer, kinds, strict=True)
    ]


def iou_reward(completions: list[Completion], answer: list[str], **kwargs: Any) -> list[float]:
    """Pay how much the one box in the answer block overlaps the reference box: intersection over union, 0 to 1.

    Both are in pixels of the image as the model sees it: `prompt_lengths.py` moves the references there, because
    Qwen2.5-VL answers in the frame of the *resized* image. Comparing with boxes of the original image is the error
    of https://github.com/om-ai-lab/VLM-R1/issues/44, which pays a model nothing for being right.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            The generated texts, plain or conversational.
        answer (`list[str]`):
            The reference boxes, as `[x1, y1, x2, y2]`.
        **kwargs:
            The other columns, and what the trainer adds; not used.
    """
    found = [extract_answer(completion_text(completion)) for completion in completions]
    return [box_overlap(text or "", reference) for text, reference in zip(found, answer, strict=True)]


def repetition_penalty_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Pay from 0 down to -1: minus the share of token 6-grams that the completion had before (TRL's rule).

    Six tokens, about four words: a sound derivation repeats short pieces (`= 2 x`), a loop long ones.
    """
    from trl.rewards import get_repetition_penalty_reward

    penalties: list[float] = get_repetition_penalty_reward(ngram_size=6)(completion_ids)
    return penalties


REWARDS: dict[str, RewardFunction] = {
    "format": format_reward,
    "accuracy": accuracy_reward,
    "iou": iou_reward,
    "repetition_penalty": repetition_penalty_reward,
}


def find_rewards(names: list[str]) -> list[RewardFunction]:
    """Return the functions for names of `REWARDS`, or for one's own as `path/to/file.py:function`.

    Raises:
        InputError: there is no such name, file or function.
    """
    return [_own_reward(name) if ":" in name else _reward(name) for name in names]


def find_format_reward(rewards: list[RewardFunction]) -> RewardFunction | None:
    """Return the reward that judges a completion's form alone, if it is there: an export is asked about it, too."""
    return format_reward if format_reward in rewards else None


def _reward(name: str) -> RewardFunction:
    if name not in REWARDS:
        raise InputError(
            f"--reward_funcs {name}: there are {', '.join(REWARDS)}; name one of your own as path/to/file.py:function"
        )
    return REWARDS[name]


def _own_reward(name: str) -> RewardFunction:
    file, _, function = name.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"--reward_funcs {name}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # Trackers and processes look functions up by their module's name.
    spec.loader.exec_module(module)
    reward = getattr(module, function, None)
    if not callable(reward):
        raise InputError(f"--reward_funcs {name}: no function {function!r} in {file}")
    return reward


def completion_text(completion: Completion) -> str:
    """Return the text of a completion in any of the forms that TRL hands to a reward function."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message.get("content") or ""
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(texts)
