"""Causes of slow rollouts."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.causes.cause import FAST, PADDING, Cause, Found, plain_rollout

if TYPE_CHECKING:
    from grpo_toolkit.step_time.causes.cause import Mean
    from grpo_toolkit.step_time.seen import Seen

TAIL_SHARE: Final = 0.25
"""Of a rollout's sequences; where no more of them still run, the others wait for the longest ones."""

BUSY: Final = 0.8
"""The share of time from which on a GPU that decodes is not waiting for launches."""

_TRL: Final = "https://huggingface.co/docs/trl/speeding_up_training"


def _cacheless(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    if rollout is None or rollout.is_cached is not False:
        return None
    decode, prefill = mean.seconds("rollout/decode"), mean.seconds("rollout/prefill")
    steps = max(mean.decode_steps / max(mean.rollouts, 1.0), 1.0)
    # With a cache a step feeds one token a sequence in place of the prompt and all that follows.
    kept = max(prefill / steps, mean.floors_s.get("rollout/decode", 0.0))
    return Found(
        evidence="each decode step computes the whole sequence again: there is no KV cache",
        savings_s={"rollout/decode": max(decode - kept, 0.0)},
    )


def _prefilled_again(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    if rollout is None or not rollout.distinct or not rollout.prefilled or rollout.distinct >= rollout.prefilled:
        return None
    share = 1.0 - rollout.distinct / rollout.prefilled
    return Found(
        evidence=f"{rollout.prefilled} prompts are prefilled, {rollout.distinct} of them different",
        savings_s={"rollout/prefill": share * mean.seconds("rollout/prefill")},
    )


def _cast(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    if rollout is None or not rollout.cast_bytes:
        return None
    savings = None
    if mean.machine is not None:  # read in 32 bits, written and read in 16
        seconds = 1.5 * rollout.cast_bytes / mean.machine.bandwidth_bytes_per_s
        savings = {"rollout/decode": mean.decode_steps * seconds, "rollout/prefill": mean.rollouts * seconds}
    return Found(
        evidence=f"autocast makes {rollout.cast_bytes / 1e9:.2f} GB of float32 weights narrower in every decode step",
        savings_s=savings,
    )


def _planned_anew(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    if rollout is None or not rollout.is_planned_anew:
        return None
    # 100.7 ms a step with new lengths and 39.5 ms with cuDNN's attention off, on an H200.
    return Found(
        evidence="cuDNN's attention, which plans for each new length of the KV cache, decodes on a Hopper GPU",
        savings_s={"rollout/decode": 0.6 * mean.seconds("rollout/decode")},
    )


def _launched(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    floor, decode = mean.floors_s.get("rollout/decode"), mean.seconds("rollout/decode")
    if not seen.is_gpu or rollout is None or rollout.engine != "generate" or rollout.is_cached is False:
        return None
    if floor is None or decode < 3 * floor or (rollout.busy is not None and rollout.busy > BUSY):
        return None
    steps = max(mean.decode_steps, 1.0)
    # Compiled steps with CUDA graphs take 2.7 times their floor (5.57 ms for 2.1 ms at the 3B shape on an H200).
    return Found(
        evidence="decode steps are launched kernel by kernel (generate without compile): "
        f"{decode / steps * 1e3:.1f} ms a step for {floor / steps * 1e3:.2f} ms of reading"
        + ("" if rollout.busy is None else f", and the GPU works for {rollout.busy:.0%} of it"),
        savings_s={"rollout/decode": decode - 2.7 * floor},
    )


def _tail(seen: Seen, mean: Mean) -> Found | None:
    rollout = seen.rollout
    if rollout is None or not rollout.lengths:
        return None
    steps = sum(max(lengths) for lengths in rollout.lengths)
    tail = sum(max(lengths) - _when_few_run(lengths) for lengths in rollout.lengths)
    if steps == 0 or tail / steps < 0.2:
        return None
    lengths = [length for one in rollout.lengths for length in one]
    return Found(
        evidence=f"in {tail} of {steps} decode steps no more than a quarter of the sequences still run: completions "
        f"of {statistics.median(lengths):.0f} tokens in the middle, the longest of {max(lengths)}",
        savings_s={"rollout/decode": tail / steps * mean.seconds("rollout/decode")},
    )


def _when_few_run(lengths: tuple[int, ...]) -> int:
    """Return the step after which no more than a quarter of the sequences run."""
    running = sorted(lengths, reverse=True)
    return running[int(TAIL_SHARE * len(running))] if len(running) > 3 else max(lengths)


def _rollout_padding(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    if rollout is None or rollout.padding is None or rollout.padding < PADDING:
        return None
    return Found(
        evidence=f"{rollout.padding:.0%} of the tokens that rollouts prefill are padding",
        savings_s={"rollout/prefill": rollout.padding * mean.seconds("rollout/prefill")},
    )


CAUSES: Final = (
    Cause(
        name="cacheless-rollout",
        title="rollouts without a KV cache",
        rule=_cacheless,
        cure="let generate use its cache; KVCacheCallback puts it back where a base was saved without",
        line="KVCacheCallback()",
    ),
    Cause(
        name="prompts-prefilled-again",
        title="copies of a prompt prefilled one by one",
        rule=_prefilled_again,
        cure="prefill each distinct prompt once and share its KV cache",
        line=FAST,
    ),
    Cause(
        name="weights-cast-each-step",
        title="weights cast in every decode step",
        rule=_cast,
        cure="decode from a copy in the narrower dtype, cast once an optimizer step",
        line=FAST,
    ),
    Cause(
        name="attention-planned-anew",
        title="cuDNN plans attention for each new length",
        rule=_planned_anew,
        cure="decode with another attention kernel",
        line="KVCacheCallback()",
    ),
    Cause(
        name="decode-launched-by-kernel",
        title="decoding launched kernel by kernel",
        rule=_launched,
        cure="compile the decode step and replay it as one CUDA graph",
        line=FAST,
    ),
    Cause(
        name="longest-answers-tail",
        title="all wait for the longest answers",
        rule=_tail,
        cure="cut completions earlier, reward shorter ones, or let an engine fill the places of those that end",
        line="max_completion_length=..., or use_vllm=True",
        link=_TRL,
    ),
    Cause(
        name="rollout-padding",
        title="padding in the rollouts' prompts",
        rule=_rollout_padding,
        cure="roll out prompts of like lengths together, and leave out the longest ones",
        line="rows sorted by length, or max_prompt_length=... in the recipe",
    ),
)
