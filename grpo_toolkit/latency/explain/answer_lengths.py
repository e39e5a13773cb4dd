"""The requests of an explanation, and the lengths of their answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.explain.facts import declared_by
from grpo_toolkit.model.generation.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grpo_toolkit.latency.engines.pool import Source
    from grpo_toolkit.latency.explain.effects import Arm


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The output tokens of each of the base's answers, and what causes add to them."""

    base: tuple[int, ...]
    added: Mapping[str, tuple[int, ...]]

    def changed(self, cause: str) -> bool:
        """Return whether the cause makes any answer longer or shorter."""
        return any(self.added.get(cause, ()))

    def of(self, arm: Arm) -> tuple[int, ...]:
        """Return the lengths with these causes on; at least two tokens, so that there is a time per token."""
        more = [self.added[cause] for cause in self.added if cause in arm]
        return tuple(max(2, sum(counts)) for counts in zip(self.base, *more, strict=True))


def minus(lengths: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    """Subtract lengths request by request."""
    return tuple(one - other for one, other in zip(lengths, others, strict=True))


def natural_requests(requests: Sequence[Request], sources: tuple[Source, Source], cap: int) -> list[Request]:
    """Return the requests, to be answered until the model ends; made up where none are given."""
    asked = list(requests)
    if not asked:
        words = "Look closely, think step by step, and say what you see. " * 12
        asked = [Request(messages=[{"role": "user", "content": words}], images=_images(sources[0]))]
    return [replace(request, max_new_tokens=cap, exact=False) for request in asked]


def _images(source: Source) -> list[Any]:
    from PIL import Image

    sees = declared_by(source, None).pixel_limits is not None
    return [Image.effect_noise((448, 448), 64).convert("RGB")] if sees else []


def lengthened(request: Request, words: int) -> Request:
    """Return the request with that many more words in front of its last text."""
    if not words:
        return request
    messages = [dict(message) for message in request.messages]
    more = "word " * words
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = more + content
    else:
        messages[-1]["content"] = [*content, {"type": "text", "text": more}]
    return replace(request, messages=messages)
