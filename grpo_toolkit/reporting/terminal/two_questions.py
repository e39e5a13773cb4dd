"""The answers to two questions after a training, in words: what thinking costs, and what a larger batch brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.latency.bench.statistics import span

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_toolkit.latency.bench.batches import Batches
    from grpo_toolkit.latency.bench.statistics import Estimate
    from grpo_toolkit.latency.bench.thinking import Thinking


def thinking_figure(thinking: Thinking) -> str:
    """Return the share of an answer's time as "62% (58% to 66%)"; "" where none is known."""
    share = thinking.share or thinking.before_answer
    return "" if share is None else _with_interval(share, lambda value: f"{value:.0%}")


def thinking_parts(thinking: Thinking) -> list[str]:
    """Return the cost of thinking in a few short sentences, the share of the time first."""
    first, direct = thinking.first_answer_s
    parts = []
    if thinking.share is None:
        if thinking.before_answer is not None:
            counts = f", {thinking.think_tokens:.0f} of {thinking.output_tokens:.0f} tokens"
            parts.append(f"{thinking_figure(thinking)} of an answer's time{counts}")
    else:
        parts.append(f"{thinking_figure(thinking)} of an answer's time, beside one without the instruction")
        assert thinking.tokens is not None
        assert thinking.seconds is not None
        parts.append(f"{_with_interval(thinking.tokens, lambda value: f'{value:+.0f}')} tokens")
        parts.append(f"{_with_interval(thinking.seconds, _signed_seconds)}")
    if first is not None:
        beside = "" if direct is None else f", without it {seconds(direct)}"
        parts.append(f"first answer token after {seconds(first)}{beside}")
    if thinking.rewards is not None:
        mine, theirs = thinking.rewards
        beside = "" if theirs is None else f", without it {theirs:.2f}"
        parts.append(f"reward {mine:.2f}{beside} ({thinking.judged_by})")
    return parts


def thinking_sentence(thinking: Thinking) -> str:
    """Return the cost of thinking as one sentence."""
    return f"Thinking: {'; '.join(thinking_parts(thinking))}."


def batch_parts(batches: Batches) -> list[str]:
    """Return what the largest batch brings, costs, and how many sequences fit, in a few short sentences."""
    small, large = batches.points[0], batches.points[-1]
    beside = f" batch {small.size}'s" if small.size > 1 else ""
    paired = batches.ratio
    per_token = large.tpot_s / small.tpot_s if paired is None else paired.median
    more = large.size / small.size / per_token
    reach = "" if paired is None else f" ({span(paired, 2)})"
    parts = [
        f"batch {large.size}: {more:.1f} times{beside} the tokens a second at {per_token:.2f} times{beside} the time "
        f"per token{reach}"
    ]
    if large.memory_bytes is not None and small.memory_bytes is not None and batches.sequence_bytes is not None:
        what = "more" if batches.is_on_gpu else "more in its KV cache"
        parts.append(f"{size(large.memory_bytes - small.memory_bytes)} {what}")
    if batches.kv_bytes_per_token is not None:
        parts.append(f"a sequence of 1,000 tokens costs {size(1000 * batches.kv_bytes_per_token)}")
    if batches.failed_at is not None:
        parts.append(f"batch {batches.failed_at} ran out of memory")
    if batches.fits is not None:
        by = "" if batches.is_on_gpu else " by their cache"
        parts.append(f"about {batches.fits:,} of {batches.tokens:,} tokens fit{by}")
    return parts


def batch_sentence(batches: Batches) -> str:
    """Return the same as one sentence."""
    text = "; ".join(batch_parts(batches))
    return f"{text[:1].upper()}{text[1:]}."


def seconds(value: float) -> str:
    """Return seconds as "1.42 s", or as milliseconds below a tenth of one."""
    return f"{value:.2f} s" if abs(value) >= 0.1 else f"{value * 1e3:.1f} ms"


def size(value: float) -> str:
    """Return bytes as "3.1 GB" or "37 MB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.1f} {name}" if value < 10 * unit else f"{value / unit:.0f} {name}"
    return f"{value:.0f} bytes"


def _with_interval(estimate: Estimate, write: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{write(estimate.median)} (no interval)"
    return f"{write(estimate.median)} ({write(estimate.low)} to {write(estimate.high)})"


def _signed_seconds(value: float) -> str:
    text = seconds(value)
    return text if value < 0 else f"+{text}"
