"""The notes on a step that is running: shapes as they pass by, and tensors to compare once it is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from grpo_toolkit.step_time.seams.busy_share import BusyShare
    from grpo_toolkit.step_time.seen import Engine, KernelsSeen


@dataclass(kw_only=True)
class ForwardNotes:
    """A forward of the model outside of rollouts: its shape, and the images in it.

    Attributes:
        phase: "forward", or "old_logprobs" or "reference_logprobs" where no gradient is wanted.
        kept: positions of each row for which there are logits or log-probabilities.
        mask: the attention mask, of a step that is looked at closely.
    """

    rows: int
    length: int
    phase: str = "forward"
    kept: int = 0
    patches: int = 0
    images: int = 0
    mask: torch.Tensor | None = None
    logits_bytes: int | None = None


@dataclass(kw_only=True)
class RolloutNotes:
    """A call that generates.

    Attributes:
        step_lengths: tokens that each of the model's forwards was fed; empty where others ran than the live model's.
        prefilled: rows of its prefill.
        new_tokens: of the longest completion.
        compiles: it compiled its decode step, for a length or number of rows that it met for the first time.
        busy: the profile of some of its decode steps; None where none is wanted.
        distinct, lengths, padding, cap: see `RolloutSeen`; of a step that is looked at closely.
    """

    engine: Engine = "generate"
    rows: int = 0
    prompt_tokens: int = 0
    patches: int = 0
    images: int = 0
    new_tokens: int = 0
    step_lengths: list[int] = field(default_factory=list)
    prefilled: int | None = None
    cast_bytes: int = 0
    is_planned_anew: bool = False
    compiles: bool = False
    busy: BusyShare | None = None
    distinct: int | None = None
    lengths: list[int] = field(default_factory=list)
    padding: float | None = None
    cap: int | None = None


@dataclass(kw_only=True)
class VisionNotes:
    """A pass of the vision tower in a forward of the training that is looked at closely.

    `attention_lengths` are those of the queries of each attention call; None where they were not counted.
    """

    images: int = 0
    distinct: int | None = None
    wants_gradient: bool = False
    attention_lengths: list[int] | None = None


@dataclass(kw_only=True)
class StepNotes:
    """All notes on one step. `is_close`: tensors are kept until its end, to be compared then.

    `given` and `call` are what its last forward with a gradient and its last `generate` were given, if it is close;
    `kernels` is what the device did in one micro-batch, if that was profiled.
    """

    is_close: bool = False
    forwards: list[ForwardNotes] = field(default_factory=list)
    rollouts: list[RolloutNotes] = field(default_factory=list)
    vision: list[VisionNotes] = field(default_factory=list)
    processed: int = 0
    pictures: list[Any] = field(default_factory=list)
    given: dict[str, Any] | None = None
    call: dict[str, Any] | None = None
    rewards_cpu: dict[str, tuple[float, float]] = field(default_factory=dict)
    kernels: KernelsSeen | None = None

    def add_images(self, given: Any) -> None:
        """Note images that the processor was given: one, a list, or a list a row."""
        pictures = list(_flat(given))
        self.processed += len(pictures)
        if self.is_close:
            self.pictures += pictures


def _flat(given: Any) -> Iterator[Any]:
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _flat(one)
    elif given is not None:
        yield given
