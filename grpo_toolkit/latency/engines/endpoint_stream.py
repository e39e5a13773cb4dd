"""The stream of an endpoint, chunk by chunk, made into an answer with a time for every token.

A server sends pieces of text, not tokens. vLLM says which tokens a piece holds (`return_token_ids`): then every token
has its time, also one that is half a character or no text at all. SGLang counts them (`continuous_usage_stats`): half
a character then has the time of the piece that completes it, and the end of sequence that of the end. Elsewhere a
piece has one time, and TPOT is over the tokens that `usage` counts in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.latency.engines.protocol import Answer
from grpo_toolkit.latency.engines.think_markers import count_thinking
from grpo_toolkit.latency.rows.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Sequence

_REASONING: Final = ("reasoning_content", "reasoning")
"""Keys under which servers that parse reasoning send it."""


@dataclass
class Stream:
    """The part of one answer that has arrived so far.

    Attributes:
        pieces: text, as it came.
        tokens: those of each piece, none where the server is silent.
        counts: tokens of the answer when each piece was there; None where the server does not say.
        times_s: when each piece arrived.
        is_reasoning: of each piece.
        usage: prompt and completion tokens.
        all_tokens: those of the whole answer, where the server names them at its end.
        finish_reason: why it ended.
        finished_s: when it said so.
        ended_s: when the last chunk arrived; 0 where none has.
    """

    pieces: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    counts: list[int | None] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    all_tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    finished_s: float = 0.0
    ended_s: float = 0.0

    def add(self, chunk: dict[str, Any], moment: float) -> None:
        """Add a chunk that arrived.

        Raises:
            AttributeError, TypeError, ValueError: it is none.
        """
        self.ended_s = moment
        usage = chunk.get("usage") or {}
        counts = ("prompt_tokens", "completion_tokens")
        self.usage |= {name: int(usage[name]) for name in counts if usage.get(name) is not None}
        named = (chunk.get("sglext") or {}).get("output_ids")
        if named:
            self.all_tokens = list(named[0])
        count = None if usage.get("completion_tokens") is None else self.usage["completion_tokens"]
        for choice in chunk.get("choices") or []:
            self._add_piece(choice, moment, count)

    def _add_piece(self, choice: dict[str, Any], moment: float, count: int | None) -> None:
        delta = choice.get("delta") or {}
        if choice.get("finish_reason"):
            self.finish_reason, self.finished_s = choice["finish_reason"], moment
        thought = next((delta[key] for key in _REASONING if delta.get(key)), None)
        text, tokens = "" + (thought or delta.get("content") or ""), list(choice.get("token_ids") or [])
        if text or tokens:
            self.pieces.append(text)
            self.tokens.append(tokens)
            self.counts.append(count)
            self.times_s.append(moment)
            self.is_reasoning.append(thought is not None)

    def close(self) -> None:
        """End the stream. Where nothing arrived, the answer was an end of sequence alone."""
        if not self.pieces:
            self.pieces, self.tokens, self.times_s, self.is_reasoning = [""], [[]], [self.ended_s], [False]
            self.counts = [None]

    @property
    def length(self) -> int:
        """The number of tokens: as the server counts them, else as they came."""
        return self.usage.get("completion_tokens") or sum(self._sizes())

    def token_times_s(self) -> list[float]:
        """Return a time for each token of each piece, as far as the server says how many those are."""
        times = [moment for moment, size in zip(self.times_s, self._sizes(), strict=True) for _ in range(size)]
        unseen = self.length - len(times) if self._is_counted() else 0
        return times + [max(self.finished_s, self.times_s[-1])] * unseen

    def _is_counted(self) -> bool:
        """Return whether every piece came with a count: a server that counts once, at the end, tells no times."""
        counts = [count for count in self.counts if count is not None]
        if any(self.tokens) or len(counts) < len(self.counts):
            return False
        return len(counts) > 1 or counts[0] < self.usage["completion_tokens"]

    def _sizes(self) -> list[int]:
        if not self._is_counted():
            return [max(1, len(tokens)) for tokens in self.tokens]
        counts = [count for count in self.counts if count is not None]
        return [max(0, count - before) for before, count in zip([0, *counts], counts, strict=False)]

    def split(self) -> tuple[int | None, int | None, float | None]:
        """Return think and answer tokens, and when the answer began; None where pieces are not counted."""
        if any(self.is_reasoning):
            # A piece without text is a marker that the server's parser took out: it counts as thinking.
            begun, pieces = self.is_reasoning.index(True), zip(self.is_reasoning, self.pieces, strict=True)
            answers = (i for i, (thinks, text) in enumerate(pieces) if i > begun and text and not thinks)
            first = next(answers, len(self.pieces))
        else:
            first = count_thinking(self.pieces)
        moment = self.times_s[first] if first < len(self.pieces) else None
        if self._is_counted():
            think = self.length if moment is None else sum(self._sizes()[:first])
        elif len(self.pieces) == self.length:
            think = first
        else:
            return None, None, moment
        return think, self.length - think, moment


def answer_of(streams: Sequence[Stream]) -> Answer:
    """Return the answer to a batch; each of several streams keeps its times, and `token_times_s` has them all."""
    lengths = [stream.length for stream in streams]
    times = [stream.token_times_s() for stream in streams]
    think = answer = first_s = None
    if len(streams) == 1:
        think, answer, first_s = streams[0].split()
    tokens = [list(chain.from_iterable(stream.tokens)) or stream.all_tokens for stream in streams]
    return Answer(
        timeline=Timeline(
            token_times_s=sorted(chain.from_iterable(times)),
            sequence_times_s=times if len(streams) > 1 else [],
            prompt_tokens=max(int(stream.usage.get("prompt_tokens") or 0) for stream in streams),
            output_tokens=sum(lengths),
            output_lengths=lengths,
            think_tokens=think,
            answer_tokens=answer,
            first_answer_s=first_s,
            is_capped=any(stream.finish_reason == "length" for stream in streams),
        ),
        tokens=tokens if [len(said) for said in tokens] == lengths else [],
        texts=["".join(stream.pieces) for stream in streams],
    )
