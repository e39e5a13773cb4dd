"""The answers to two questions after a training, in words: what thinking costs, and what a larger batch brings."""

from __future__ import annotations

from dataclasses import replace
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
    return "" if share is None else _told(share, _percent)


def thinking_parts(thinking: Thinking) -> list[str]:
    """Return the cost of thinking in a few short sentences: the share of the time first, then what it brings."""
    first, direct = thinking.first_answer_s
    parts = []
    compared = None not in (thinking.share, thinking.tokens, thinking.seconds)
    if compared:
        parts.append(f"{thinking_figure(thinking)} of an answer's time, asked with and without the instruction")
    elif thinking.before_answer is not None:
        parts.append(f"{thinking_figure(thinking)} of an answer's time")
    if thinking.think_tokens:
        parts.append(f"{thinking.think_tokens:.0f} of {thinking.output_tokens:.0f} tokens are thoughts")
    if thinking.rewards is not None:
        mine, theirs = thinking.rewards
        beside = "" if theirs is None else f", without it {theirs:.2f}"
        # What thinking buys comes before what it is: right behind the share of the time.
        parts.insert(len(parts) if theirs is None else 1, f"reward {mine:.2f}{beside} ({thinking.judged_by})")
    if compared and thinking.tokens is not None and thinking.seconds is not None:
        parts.append(_longer(thinking.tokens, lambda value: f"{value:,.0f}", " tokens"))
        in_ms = max(abs(end or 0.0) for end in (thinking.seconds.median, thinking.seconds.low, thinking.seconds.high))
        parts.append(_longer(thinking.seconds, _milliseconds if in_ms < 0.1 else _seconds))
    if first is not None:
        beside = "" if direct is None else f", without it {seconds(direct)}"
        parts.append(f"first answer token after {seconds(first)}{beside}")
    return parts


def thinking_sentence(thinking: Thinking) -> str:
    """Return the cost of thinking as one sentence."""
    return f"Thinking: {'; '.join(thinking_parts(thinking))}."


def batch_parts(batches: Batches) -> list[str]:
    """Return what the largest batch brings, costs, and how many sequences fit, in a few short sentences."""
    small, large = batches.points[0], batches.points[-1]
    beside = f" batch {small.size}'s" if small.size > 1 else ""
    reach = "" if batches.ratio is None else f" ({span(batches.ratio, 2)})"
    parts = [
        f"batch {large.size}: {batches.gain:.1f} times{beside} the tokens a second at {batches.slowdown:.2f} "
        f"times{beside} the time per token{reach}"
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
        parts.append(f"about {batches.fits:,} sequences of {batches.tokens:,} tokens fit{by}")
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


def _told(estimate: Estimate, write: Callable[[float], str]) -> str:
    """Return a figure with its interval; the interval alone where it does not say on which side of 0 the figure is."""
    if estimate.low is None or estimate.high is None:
        return f"{write(estimate.median)} (no interval)"
    reach = f"{write(estimate.low)} to {write(estimate.high)}"
    if estimate.low < 0 < estimate.high:
        return f"cannot tell: {reach}"
    return write(estimate.median) if estimate.low == estimate.high else f"{write(estimate.median)} ({reach})"


def _longer(estimate: Estimate, write: Callable[[float], str], unit: str = "") -> str:
    """Return by how much an answer is longer, or shorter where all of the interval says so."""
    low, high = estimate.low, estimate.high
    if estimate.median < 0 and (high is None or high <= 0):
        turned = replace(estimate, median=-estimate.median)
        if low is not None and high is not None:
            turned = replace(turned, low=-high, high=-low)
        return f"{_told(turned, write)}{unit} shorter"
    return f"{_told(estimate, write)}{unit} longer"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"
