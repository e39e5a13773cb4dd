"""Requests: a prompt, its images and limits, from dataset rows, from a trainer's log, or made up."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.generation.trainer_rows import images_of, opened, prompt_of, trainer_datasets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from PIL.Image import Image

_MOST_ROWS = 32
"""The rows that are looked at for some whose images can be read."""


def find_requests(
    prompts: Iterable[Mapping[str, Any]] | None, kwargs: Mapping[str, Any], *, limit: int, state: Any = None
) -> list[Request]:
    """Return the prompts given, or the first rows of the trainer's datasets; none where those cannot be indexed.

    Datasets are read by index, past the samplers: iterating a trainer's dataloader would move its random state.

    Args:
        prompts: rows, which go before the trainer's.
        kwargs: what the trainer gives its callbacks.
        limit: the most rows to read.
        state: the trainer's state, where transformers 4.49 keeps the dataloader.
    """
    if prompts is not None:
        return requests_from_rows(prompts, limit=limit)
    for dataset in trainer_datasets(kwargs, state):
        if prompt_of(dataset[0]) is not None:
            return list(islice(_readable(dataset), limit))
    return []


def _readable(dataset: Any) -> Iterator[Request]:
    """Yield the first rows as requests; a row whose image lies elsewhere (relative to a folder, say) is left out."""
    for index in range(min(len(dataset), _MOST_ROWS)):
        with suppress(OSError):
            yield from requests_from_rows([dataset[index]], limit=1)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request for one answer.

    Attributes:
        messages: the conversation in chat form, `[{"role": ..., "content": str | parts}]`.
        images: images for the conversation's image parts, in order; where the contents are plain strings they go in
            front of the first user text.
        max_new_tokens: the most tokens to generate; with 0 the processor alone is asked.
        exact: generate exactly `max_new_tokens`, ignoring the end-of-sequence token.
        use_cache: None leaves it to the model's own files, which is what a user gets.
        with_rivals: also record by how much each token won, and over which (costs keeping the logits).
        with_evidence: also keep what the processor gave and the first logits, to compare another model with.
        forced: tokens to say whatever the logits are: two models can be compared where they would part.
    """

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image] = ()
    max_new_tokens: int = 64
    exact: bool = False
    use_cache: bool | None = None
    with_rivals: bool = False
    with_evidence: bool = False
    forced: Sequence[int] = ()


Request = GenerationRequest
"""The older name, which is the one inside this package."""


def logged_requests(trainer: Any, *, limit: int = 4, max_new_tokens: int = 64) -> list[Request]:
    """Return the last prompts that a trainer has logged, each once; none where it keeps no such log.

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
    """Make a request of a prompt as TRL's trainers take it.

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
            inside += [opened(part["image"]) for part in content if part.get("image") is not None]
            # A part of another kind has a text of null where a dataset stores all parts in one schema.
            parts = [{key: part[key] for key in ("type", "text") if part.get(key) is not None} for part in content]
            content = parts
        messages.append({**turn, "content": content})
    images = inside or (beside if isinstance(beside, (list, tuple)) else [beside] if beside is not None else [])
    return Request(messages=messages, images=images, max_new_tokens=max_new_tokens)


def plain_request() -> Request:
    """Return a request that any language model can answer."""
    return Request(messages=[{"role": "user", "content": "Count from one to ten."}], max_new_tokens=16)


def requests_from_rows(rows: Iterable[Mapping[str, Any]], *, limit: int, max_new_tokens: int = 64) -> list[Request]:
    """Turn dataset rows, as TRL's trainers take them, into requests.

    Args:
        rows: mappings with `prompt` or `messages` (chat messages, or plain text) and, outside it, optionally `image`,
            `images` or `image_path`: images, or where they lie.
        limit: the most rows to read.
        max_new_tokens: of each request.
    """
    found = []
    for row in islice(iter(rows), limit):
        found.append(request_of(_without_answer(prompt_of(row)), images_of(row), max_new_tokens=max_new_tokens))
    return found


def _without_answer(prompt: Any) -> Any:
    while not isinstance(prompt, str) and prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return prompt
