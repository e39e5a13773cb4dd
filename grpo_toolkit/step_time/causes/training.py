"""Causes in forwards and backwards, and in what the GPU waits for."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.causes.cause import PADDING, Cause, Found

if TYPE_CHECKING:
    from grpo_toolkit.step_time.causes.cause import Mean
    from grpo_toolkit.step_time.seen import Seen

REWARDS: Final = 0.05
READING: Final = 0.025
SAVING: Final = 0.05
"""Shares of the step from which on a phase is a cause."""

FREE_MEMORY: Final = 0.9
LOGITS_BYTES: Final = 1 << 30

_MEMORY: Final = "https://huggingface.co/docs/trl/reducing_memory_usage"
_ONE_GPU: Final = "https://huggingface.co/docs/transformers/perf_train_gpu_one"
_LOADER: Final = "https://docs.pytorch.org/docs/stable/data.html#multi-process-data-loading"


def _padding(seen: Seen, mean: Mean) -> Found | None:
    if seen.padding is None or seen.padding < PADDING or seen.settings.is_packed:
        return None
    text = {
        name: _without_vision(mean, name) for name in ("old_logprobs", "reference_logprobs", "forward", "backward")
    }
    is_rollout = seen.rollout is not None
    return Found(
        evidence=f"{seen.padding:.0%} of the tokens in the training's forwards are padding",
        savings_s={name: seen.padding * seconds for name, seconds in text.items()},
        cure="train prompts and completions of like lengths together, and leave out the longest prompts"
        if is_rollout
        else "put short rows behind each other instead of padding them",
        line="max_completion_length=..., or rows sorted by length" if is_rollout else "SFTConfig(packing=True)",
    )


def _without_vision(mean: Mean, phase: str) -> float:
    if phase != "backward":
        return mean.seconds(phase) - mean.seconds(f"{phase}/vision")
    forward = mean.seconds("forward")
    return mean.seconds(phase) * (1 - mean.seconds("forward/vision") / forward if forward > 0 else 0.0)


def _rewards(seen: Seen, mean: Mean) -> Found | None:
    slow = {name: mean.seconds(f"rewards/{name}") for name in seen.rewards_cpu}
    slow = {name: seconds for name, seconds in slow.items() if seconds > REWARDS * mean.wall_s}
    if not slow:
        return None
    name = max(slow, key=lambda one: slow[one])
    busy = seen.rewards_cpu[name]
    doing = "waits for something else" if busy < 0.5 else "computes on one core" if busy < 1.5 else "computes"
    return Found(
        evidence=f"{name} runs in the training's process while the GPU idles, and {doing} "
        f"({busy:.1f} cores busy while it runs)",
        savings_s={"rewards": 0.75 * sum(slow.values())},
    )


def _checkpointing(seen: Seen, mean: Mean) -> Found | None:
    asked = seen.settings
    if not asked.is_checkpointing or not asked.activations_bytes or not asked.total_bytes or not asked.peak_bytes:
        return None
    if asked.peak_bytes + asked.activations_bytes > FREE_MEMORY * asked.total_bytes:
        return None
    return Found(
        evidence=f"activations are computed again, and {(asked.total_bytes - asked.peak_bytes) / 1e9:.0f} GB of "
        f"memory stay free, where they need about {asked.activations_bytes / 1e9:.0f}",
        savings_s={"backward": mean.seconds("backward") / 3},  # a forward of the three that it takes with it
    )


def _small_batches(seen: Seen, mean: Mean) -> Found | None:
    asked = seen.settings
    if asked.accumulation < 2 or not asked.total_bytes or not asked.peak_bytes:
        return None
    free = FREE_MEMORY * asked.total_bytes - asked.peak_bytes
    if free < (asked.activations_bytes or asked.total_bytes):
        return None
    floors = mean.floors_s.get("forward", 0.0) + mean.floors_s.get("backward", 0.0)
    time = mean.seconds("forward") + mean.seconds("backward")
    if not floors or time < 3 * floors:
        return None  # as busy as it gets
    saved = {name: (mean.seconds(name) - mean.floors_s.get(name, 0.0)) / 2 for name in ("forward", "backward")}
    if seen.kernels is not None:  # twice the rows halve the launches, and no more is known to be waited for
        saved = {name: seen.kernels.idle / 2 * mean.seconds(name) for name in saved}
    return Found(
        evidence=f"{asked.accumulation} micro-batches of {asked.batch_size} rows a step, and {free / 1e9:.0f} GB of "
        "memory stay free",
        savings_s=saved,
        line=f"per_device_train_batch_size={asked.batch_size * 2}, "
        f"gradient_accumulation_steps={max(asked.accumulation // 2, 1)}",
    )


def _logits(seen: Seen, mean: Mean) -> Found | None:
    if seen.logits_bytes is None or seen.logits_bytes < LOGITS_BYTES:
        return None
    savings = None
    if mean.machine is not None:  # written, read, softmax and its gradient: about six passes
        savings = {"forward": 6 * seen.logits_bytes / mean.machine.bandwidth_bytes_per_s}
    return Found(
        evidence=f"a forward returns logits over the whole vocabulary, {seen.logits_bytes / 1e9:.1f} GB in float32",
        savings_s=savings,
    )


def _saves(seen: Seen, mean: Mean) -> Found | None:
    if mean.share("saving") < SAVING:
        return None
    return Found(
        evidence=f"training waits while checkpoints are written: {mean.share('saving'):.0%} of a step on average",
        savings_s={"saving": mean.seconds("saving") * 0.9},
    )


def _reading(seen: Seen, mean: Mean) -> Found | None:
    if seen.settings.workers or mean.share("reading_rows") < READING:
        return None
    return Found(
        evidence="rows are read by the training's process itself (dataloader_num_workers=0) while the GPU idles",
        savings_s={"reading_rows": 0.9 * mean.seconds("reading_rows")},
    )


def _ranks(seen: Seen, mean: Mean) -> Found | None:
    if len(mean.busy_s) < 2:
        return None
    slowest = max(mean.busy_s, key=lambda rank: mean.busy_s[rank])
    usual = statistics.median(seconds for rank, seconds in mean.busy_s.items() if rank != slowest)
    if mean.busy_s[slowest] < 1.1 * usual or mean.busy_s[slowest] - usual < 0.02 * mean.wall_s:
        return None
    return Found(
        evidence=f"rank {slowest} is busy for {mean.busy_s[slowest]:.2f} s before the ranks meet, the others for "
        f"{usual:.2f} s: they wait for it",
        savings_s={"waiting_for_ranks": mean.busy_s[slowest] - usual} if mean.seconds("waiting_for_ranks") else None,
    )


CAUSES: Final = (
    Cause(
        name="padding",
        title="padding in the training's forwards",
        rule=_padding,
        cure="train rows of like lengths together",
        link=_MEMORY,
    ),
    Cause(
        name="logits-of-the-vocabulary",
        title="logits over the whole vocabulary in float32",
        rule=_logits,
        cure="compute log-probabilities in pieces",
        line="use_liger_kernel=True, or TRL 1.16 and later",
        link=_MEMORY,
    ),
    Cause(
        name="checkpointing-with-free-memory",
        title="activations computed again although memory is free",
        rule=_checkpointing,
        cure="keep the activations",
        line="gradient_checkpointing=False",
        link=_ONE_GPU,
    ),
    Cause(
        name="small-micro-batches",
        title="micro-batches smaller than fit",
        rule=_small_batches,
        cure="train more rows at once and accumulate fewer times",
        link=_ONE_GPU,
    ),
    Cause(
        name="rewards-one-by-one",
        title="rewards while the GPU idles",
        rule=_rewards,
        cure="score completions in several processes, or make the reward function async if it waits for others",
        line="async def reward(...), or concurrent.futures.ProcessPoolExecutor in it",
    ),
    Cause(
        name="ranks-wait",
        title="processes wait for the slowest",
        rule=_ranks,
        cure="give every rank prompts and completions of like lengths; look at that rank's machine",
    ),
    Cause(
        name="saves-block",
        title="training waits for its saves",
        rule=_saves,
        cure="save less often, or without the optimizer's state",
        line="save_steps=..., save_only_model=True",
    ),
    Cause(
        name="rows-read-in-line",
        title="rows read while the GPU idles",
        rule=_reading,
        cure="keep the rows that were read, or read them in processes of their own",
        line="train_dataset=rows_once(dataset), or dataloader_num_workers=4",
        link=_LOADER,
    ),
)
