"""What is asked: requests made from the rows of a training dataset, or made up where there are none."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from grpo_toolkit.inference import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def requests_from_rows(rows: Iterable[Mapping[str, Any]], *, limit: int, max_new_tokens: int = 64) -> list[Request]:
    """Turn dataset rows, as TRL's trainers take them, into requests.

    Args:
        rows: mappings with `prompt` (chat messages, or plain text) and optionally `image` or `images`.
        limit: the most rows to read.
        max_new_tokens: of each request.
    """
    return [_request(row, max_new_tokens) for row in islice(iter(rows), limit)]


def _request(row: Mapping[str, Any], max_new_tokens: int) -> Request:
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    return Request(messages=_without_answer(messages), images=images, max_new_tokens=max_new_tokens)


def _without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def fixed_length(requests: Sequence[Request], new_tokens: int) -> list[Request]:
    """The same requests with exactly `new_tokens` tokens each: speed alone, whatever the models would say."""
    return [replace(request, max_new_tokens=new_tokens, exact=True) for request in requests]
