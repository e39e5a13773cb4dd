"""The raw times of one measured answer, or of one batch of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.short_repr import ShortRepr

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_ONCE_S: Final = 5e-5
"""Seconds per token that no model needs: 20,000 tokens a second of one sequence."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Timeline(ShortRepr):
    """A measured request (or batch), raw.

    `token_times_s` run from the start of preprocessing, one per step of the batch; of an endpoint, one per token where
    it says which tokens arrived (vLLM) or how many (SGLang), otherwise one per piece of text. Where sequences were
    streams of their own, these are the times of all of them, in order, and `sequence_times_s` those of each.
    `output_tokens` is of the whole batch, `output_lengths` of each of its sequences. `prompt_tokens` is the longest
    prompt, `image_tokens` those of one sequence; `is_capped`: any sequence ended at the cap. `reward`: what the
    training's reward functions pay for it (see `LatencyRow.judged_by`).
    """

    token_times_s: list[float]
    prompt_tokens: int
    output_tokens: int
    output_lengths: list[int] = field(default_factory=list)
    sequence_times_s: list[list[float]] = field(default_factory=list)
    image_tokens: int | None = None
    think_tokens: int | None = None
    answer_tokens: int | None = None
    first_answer_s: float | None = None
    is_capped: bool | None = None
    reward: float | None = None
    phases_s: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """The time to the first token, preprocessing included; of several streams, to the first token of any."""
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """The time per output token of one sequence.

        Of a batch that steps together it is the longest sequence's, of several streams the median over them, each by
        its own first and last token. Where streams step together, both are the same.

        None where no sequence has two tokens, or where they arrived at once (`AT_ONCE_S`): something on the way held
        the answer back, a server with few cores or a proxy that buffers, and nothing is known of its tokens' times.
        """
        lengths = self.output_lengths or [self.output_tokens]
        if not self.sequence_times_s:
            return _tpot_s(self.token_times_s, max(lengths))
        found = [_tpot_s(times, length) for times, length in zip(self.sequence_times_s, lengths, strict=True)]
        return statistics.median(there) if (there := [tpot for tpot in found if tpot is not None]) else None

    @property
    def is_at_once(self) -> bool:
        """Return whether it has no TPOT although it has the tokens for one."""
        return self.tpot_s is None and max(self.output_lengths or [self.output_tokens]) > 1

    @property
    def streams_s(self) -> list[list[float]]:
        """The lists of token times in which a gap is one sequence's: one a stream, or one of the batch's steps."""
        return self.sequence_times_s or [self.token_times_s]

    @property
    def e2e_s(self) -> float:
        """The time until the whole text is there."""
        return self.token_times_s[-1] + self.phases_s.get("detokenize_s", 0.0)


def _tpot_s(times: Sequence[float], tokens: int) -> float | None:
    if tokens < 2:
        return None
    tpot_s = (times[-1] - times[0]) / (tokens - 1)
    return tpot_s if tpot_s > AT_ONCE_S else None
