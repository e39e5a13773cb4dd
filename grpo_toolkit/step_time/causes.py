"""The causes for which a step is slow: one small rule each, with evidence that needs no clock, effect, cure and link.

A rule is given what was seen of a step and the mean step's seconds, and says what it saw and how many seconds of what
phase its cure would save. The seconds are predictions, from counts, bytes and FLOPs and the phase's own time; in the
order of `CAUSES` they are taken off a phase where several share it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from grpo_toolkit.step_time.seen import RolloutSeen, Seen, VisionSeen
    from grpo_toolkit.step_time.work import Machine

_DOCS: Final = "docs/benchmarks/training.md"
_TRL: Final = "https://huggingface.co/docs/trl/speeding_up_training"
_MEMORY: Final = "https://huggingface.co/docs/trl/reducing_memory_usage"
_ONE_GPU: Final = "https://huggingface.co/docs/transformers/perf_train_gpu_one"
_LOADER: Final = "https://docs.pytorch.org/docs/stable/data.html#multi-process-data-loading"

PACKED: Final = "PackedVisionCallback()"
FAST: Final = "FastRolloutCallback()"

LAUNCHES_A_CALL: Final = 6
LAUNCHES_A_LAYER: Final = 20
"""Kernels of a segment's own attention (split, transpose, attend, join), and of all else in a tower's layer."""

TAIL_SHARE: Final = 0.25
"""Of a rollout's sequences; where no more of them still run, the others wait for the longest ones."""

PADDING: Final = 0.3
REWARDS: Final = 0.05
READING: Final = 0.05
SAVING: Final = 0.05
"""Shares from which on something is a cause: of padding in the tokens, of a phase in the step."""

FREE_MEMORY: Final = 0.9
LOGITS_BYTES: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean step: seconds of phases and their parts, and what physics asks for.

    `busy_s`: of each rank, the seconds until the ranks meet: rows, images, rollouts, rewards.
    """

    wall_s: float
    phases_s: dict[str, float]
    parts_s: dict[str, float] = field(default_factory=dict)
    floors_s: dict[str, float] = field(default_factory=dict)
    decode_steps: float = 0.0
    rollouts: float = 0.0
    machine: Machine | None = None
    busy_s: dict[int, float] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase or of a part."""
        return self.phases_s.get(name, 0.0) if "/" not in name else self.parts_s.get(name, 0.0)

    def share(self, phase: str) -> float:
        """Return a phase's share of the step."""
        return self.seconds(phase) / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rule has found: its evidence, and the seconds that a cure saves, by phase or part; None: not known."""

    evidence: str
    savings_s: dict[str, float] | None = None
    cure: str | None = None
    line: str | None = None


Rule = Callable[["Seen", Mean], "Found | None"]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One cause.

    Attributes:
        name: stable, in kebab-case.
        title: in a few words.
        rule: tells whether it is there, what shows it, and what it costs.
        cure, line: what to do, and the line of code or setting for it.
        link: where it is described.
    """

    name: str
    title: str
    rule: Rule
    cure: str
    line: str = ""
    link: str = _DOCS


def _plain_rollout(seen: Seen) -> RolloutSeen | None:
    rollout = seen.rollout
    return rollout if rollout is not None and rollout.engine in ("generate", "fast") and rollout.rows else None


def _vision(seen: Seen) -> VisionSeen | None:
    return seen.vision if seen.vision is not None and seen.vision.images else None


def _cacheless(seen: Seen, mean: Mean) -> Found | None:
    rollout = _plain_rollout(seen)
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


def _windows(seen: Seen, mean: Mean) -> Found | None:
    vision = _vision(seen)
    if vision is None or not vision.attention_calls or not vision.attention_layers:
        return None
    calls = vision.attention_calls / vision.attention_layers
    if calls < 2:
        return None
    launched = LAUNCHES_A_CALL * calls + LAUNCHES_A_LAYER
    share = LAUNCHES_A_CALL * (calls - 1) / launched
    return Found(
        evidence=f"{vision.attention_calls:,} attention calls in one pass of the vision tower over "
        f"{vision.images:.0f} images: {calls:.0f} a layer, one for each window or image",
        savings_s=_of_tower(mean, share),
    )


def _images_again(seen: Seen, mean: Mean) -> Found | None:
    vision = _vision(seen)
    if vision is None or not vision.distinct or vision.distinct >= vision.images:
        return None
    share = 1.0 - vision.distinct / vision.images
    return Found(
        evidence=f"the vision tower encodes {vision.images:.0f} images a forward, {vision.distinct:.0f} of them "
        "different",
        savings_s=_of_tower(mean, share),
    )


def _of_tower(mean: Mean, share: float) -> dict[str, float]:
    """Return a share of the tower's seconds: in forwards and prefill as measured, backward as its share of forward."""
    forward, vision = mean.seconds("forward"), mean.seconds("forward/vision")
    of_backward = mean.seconds("backward") * (vision / forward if forward > 0 else 0.0)
    names = ("rollout/prefill", "old_logprobs", "reference_logprobs")
    savings = {name: share * mean.seconds(f"{name}/vision") for name in names}
    return savings | {"forward": share * vision, "backward": share * of_backward}


def _frozen_tower(seen: Seen, mean: Mean) -> Found | None:
    vision = _vision(seen)
    if vision is None or not (vision.is_frozen and vision.wants_gradient):
        return None
    forward = mean.seconds("forward")
    share = mean.seconds("forward/vision") / forward if forward > 0 else 0.0
    return Found(
        evidence="no weight of the vision tower trains, and its output wants a gradient: it is backpropagated",
        savings_s={"backward": share * mean.seconds("backward")},
    )


def _prefilled_again(seen: Seen, mean: Mean) -> Found | None:
    rollout = _plain_rollout(seen)
    if rollout is None or not rollout.distinct or not rollout.prefilled or rollout.distinct >= rollout.prefilled:
        return None
    share = 1.0 - rollout.distinct / rollout.prefilled
    return Found(
        evidence=f"{rollout.prefilled} prompts are prefilled, {rollout.distinct} of them different",
        savings_s={"rollout/prefill": share * mean.seconds("rollout/prefill")},
    )


def _cast(seen: Seen, mean: Mean) -> Found | None:
    rollout = _plain_rollout(seen)
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
    rollout = _plain_rollout(seen)
    if rollout is None or not rollout.is_planned_anew:
        return None
    # 100.7 ms a step with new lengths and 39.5 ms with cuDNN's attention off, on an H200.
    return Found(
        evidence="cuDNN's attention, which plans for each new length of the KV cache, decodes on a Hopper GPU",
        savings_s={"rollout/decode": 0.6 * mean.seconds("rollout/decode")},
    )


def _launched(seen: Seen, mean: Mean) -> Found | None:
    rollout = _plain_rollout(seen)
    floor, decode = mean.floors_s.get("rollout/decode"), mean.seconds("rollout/decode")
    if not seen.is_gpu or rollout is None or rollout.engine != "generate" or rollout.is_cached is False:
        return None
    if floor is None or decode < 3 * floor:
        return None
    steps = max(mean.decode_steps, 1.0)
    # Compiled steps with CUDA graphs take 2.7 times their floor (5.57 ms for 2.1 ms at the 3B shape on an H200).
    return Found(
        evidence="decode steps are launched kernel by kernel (generate without compile): "
        f"{decode / steps * 1e3:.1f} ms a step for {floor / steps * 1e3:.2f} ms of reading",
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
    rollout = _plain_rollout(seen)
    if rollout is None or rollout.padding is None or rollout.padding < PADDING:
        return None
    return Found(
        evidence=f"{rollout.padding:.0%} of the tokens that rollouts prefill are padding",
        savings_s={"rollout/prefill": rollout.padding * mean.seconds("rollout/prefill")},
    )


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


def _processed_again(seen: Seen, mean: Mean) -> Found | None:
    if not seen.processed_distinct or seen.processed <= seen.processed_distinct:
        return None
    share = 1.0 - seen.processed_distinct / seen.processed
    return Found(
        evidence=f"the image processor is given {seen.processed} images a step, {seen.processed_distinct} of them "
        "different",
        savings_s={"image_processing": share * mean.seconds("image_processing")},
    )


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
    names = ("forward", "backward")
    return Found(
        evidence=f"{asked.accumulation} micro-batches of {asked.batch_size} rows a step, and {free / 1e9:.0f} GB of "
        "memory stay free",
        savings_s={name: (mean.seconds(name) - mean.floors_s.get(name, 0.0)) / 2 for name in names},
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
    usual = statistics.median(mean.busy_s.values())
    if mean.busy_s[slowest] < 1.1 * usual or mean.busy_s[slowest] - usual < 0.02 * mean.wall_s:
        return None
    return Found(
        evidence=f"rank {slowest} is busy for {mean.busy_s[slowest]:.2f} s before the ranks meet, the others for "
        f"{usual:.2f} s: they wait for it",
        savings_s={"waiting_for_ranks": mean.busy_s[slowest] - usual} if mean.seconds("waiting_for_ranks") else None,
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
        name="attention-by-window",
        title="vision attention launched window by window",
        rule=_windows,
        cure="make one attention call a layer",
        line=PACKED,
    ),
    Cause(
        name="images-encoded-again",
        title="copies of an image encoded one by one",
        rule=_images_again,
        cure="encode each distinct image of a batch once",
        line=PACKED,
    ),
    Cause(
        name="frozen-tower-backpropagated",
        title="a frozen vision tower backpropagated",
        rule=_frozen_tower,
        cure="want no gradient of a tower in which nothing trains",
        line=PACKED,
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
    Cause(
        name="padding",
        title="padding in the training's forwards",
        rule=_padding,
        cure="train rows of like lengths together",
        link=_MEMORY,
    ),
    Cause(
        name="images-processed-again",
        title="images processed again and again",
        rule=_processed_again,
        cure="process each distinct image of a step once, and keep the result",
        line=PACKED,
    ),
    Cause(
        name="rewards-one-by-one",
        title="rewards while the GPU idles",
        rule=_rewards,
        cure="score completions in several processes, or make the reward function async if it waits for others",
        line="async def reward(...), or concurrent.futures.ProcessPoolExecutor in it",
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
"""Every cause, in the order in which their savings are taken off a phase."""

BY_NAME: Final = {cause.name: cause for cause in CAUSES}
