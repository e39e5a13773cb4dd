"""The facts about a step that need no clock: counts, shapes, flags, settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Engine = Literal["generate", "fast", "vllm", "continuous batching"]


@dataclass(frozen=True, kw_only=True)
class RolloutSeen:
    """The facts of a step's rollouts.

    Attributes:
        engine: what generated: plain `generate`, our compiled rollouts, or another.
        rows, distinct: prompts, and different ones among them; `prefilled`: how many the model's prefill was given.
        padding: the share of padding in the prompts.
        is_cached: whether a decode step feeds one token.
        lengths: tokens of each completion of each rollout, up to and with its end.
        cap: tokens after which a completion is cut.
        cast_bytes: bytes of weights that autocast casts in every forward of it.
        busy: the share of the time of some decode steps in which the GPU worked; None where they were not profiled.
        is_planned_anew: cuDNN's attention plans for each new length of the KV cache (Hopper).
    """

    engine: Engine = "generate"
    rows: int = 0
    distinct: int | None = None
    prefilled: int | None = None
    padding: float | None = None
    is_cached: bool | None = None
    lengths: tuple[tuple[int, ...], ...] = ()
    cap: int | None = None
    cast_bytes: int = 0
    is_planned_anew: bool = False
    busy: float | None = None


@dataclass(frozen=True, kw_only=True)
class VisionSeen:
    """The facts of the vision tower in the training's forwards.

    Attributes:
        images, distinct: that it was given in a forward on average, and different ones among them.
        attention_calls, attention_layers: calls of the attention in one pass, and layers that make them.
        packed_calls: what `PackedVisionCallback` would leave of these calls on this device; None: one a layer.
        is_frozen: none of its parameters trains; `wants_gradient`: its output wants one.
    """

    images: float = 0.0
    distinct: float | None = None
    attention_calls: int | None = None
    attention_layers: int = 0
    packed_calls: int | None = None
    is_frozen: bool = False
    wants_gradient: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelsSeen:
    """Shares of the time of one micro-batch's forward and backward, by what the device did; they add up to 1.

    Attributes:
        products: matrix products; `attention`: its kernels.
        between: all other kernels, and copies.
        exchange: between processes, while nothing is computed.
        idle: nothing.
    """

    products: float
    attention: float
    between: float
    exchange: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training, and the memory that it takes.

    Attributes:
        accumulation, batch_size: micro-batches a step, and rows in each.
        workers: of the data loader.
        is_checkpointing: activations are computed again in the backward pass.
        activations_bytes: what they would take if they were kept, of one micro-batch, roughly.
        peak_bytes, total_bytes: of the GPU's memory.
        is_packed: sequences are packed, or stand behind each other without padding.
    """

    accumulation: int = 1
    batch_size: int = 1
    workers: int = 0
    is_checkpointing: bool = False
    activations_bytes: float | None = None
    peak_bytes: int | None = None
    total_bytes: int | None = None
    is_packed: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that was seen of a step that was looked at closely.

    Attributes:
        padding: the share of padding in the training's forwards.
        logits_bytes: of the largest logits over the whole vocabulary, as float32.
        processed, processed_distinct: images that the processor was given in a step, and different ones.
        rewards_cpu: processor time over wall time, of each reward function that is Python.
        is_gpu: where it ran.
        kernels: of one micro-batch; None where none was profiled.
    """

    rollout: RolloutSeen | None = None
    vision: VisionSeen | None = None
    settings: Settings = field(default_factory=Settings)
    padding: float | None = None
    logits_bytes: int | None = None
    processed: int = 0
    processed_distinct: int | None = None
    rewards_cpu: dict[str, float] = field(default_factory=dict)
    is_gpu: bool = False
    kernels: KernelsSeen | None = None
