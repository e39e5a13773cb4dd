"""The instruction to think in a prompt, and the same prompt without it.

A training asks for thoughts in its system message, or in a sentence of the user's: "First output the thinking process
in <think> </think> tags ..." (https://github.com/om-ai-lab/VLM-R1). Both are known by the marker that they name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.model.generation.request import Request

MARKER: Final = "<think>"
_SENTENCE_ENDS: Final = re.compile(r"(?<=[.!?:\n])\s+")


def find_thinking(requests: Sequence[Request], instruction: str | None = None) -> tuple[list[Request], list[Request]]:
    """Return requests as they ask for thoughts, and the same without that instruction; two empty lists without one.

    Args:
        requests: a training's prompts.
        instruction: the text that asks for thoughts, a system message or a part of a message; where no prompt holds
            it, it is put at the end of the system message, or becomes one. None looks for the system message that
            names `<think>`, and for the sentences of the user's messages that do.
    """
    if instruction is None:
        direct = [_changed(request, _without_marked) for request in requests]
        is_there = any(one.messages != other.messages for one, other in zip(requests, direct, strict=True))
        return (list(requests), direct) if is_there else ([], [])
    direct = [_changed(request, lambda _, text: text.replace(instruction, "").strip()) for request in requests]
    if any(one.messages != other.messages for one, other in zip(requests, direct, strict=True)):
        return list(requests), direct
    return [_with_instruction(request, instruction) for request in requests], list(requests)


def _with_instruction(request: Request, instruction: str) -> Request:
    """Return the request with the instruction at the end of its system message, or as one."""
    if any(message["role"] == "system" for message in request.messages):
        return _changed(request, lambda role, text: f"{text}\n{instruction}" if role == "system" else text)
    return replace(request, messages=[{"role": "system", "content": instruction}, *request.messages])


def _changed(request: Request, change: Callable[[str, str], str]) -> Request:
    """Return the request with its system and user texts changed; a system message without any text left is gone."""
    messages = []
    for message in request.messages:
        content = message["content"]
        if message["role"] not in ("system", "user"):
            messages.append(message)
            continue
        if isinstance(content, str):
            content = change(message["role"], content)
        else:
            parts = [
                {**part, "text": change(message["role"], part["text"])} if part.get("text") else part
                for part in content
            ]
            content = [part for part in parts if part.get("type") != "text" or part.get("text")]
        if content or message["role"] == "user":
            messages.append({**message, "content": content})
    return replace(request, messages=messages)


def _without_marked(role: str, text: str) -> str:
    """Return a text without what names the marker: a system message whole, of a user's message its sentences."""
    if MARKER not in text:
        return text
    if role == "system":
        return ""
    sentences = _SENTENCE_ENDS.split(text)
    return " ".join(sentence for sentence in sentences if MARKER not in sentence and "</think>" not in sentence)
