"""The work of a step and the time that physics asks for it: FLOPs over FLOP/s, bytes over bandwidth.

    forward            2 x parameters x tokens + attention; the vision tower once for each distinct image
    backward           the forward again for the activations' gradients, and for the weights that train; once more
                       where activations are computed again (checkpointing); none for a frozen tower
    prefill            the forward of each distinct prompt
    decoding           weights once a step, and the KV cache of every sequence, over the bandwidth
    optimizer          28 bytes a trained weight (Adam in float32: weight, gradient, two moments, read and written)

(Kaplan et al. 2020, arXiv:2001.08361, section 2.1, for 2 x parameters x tokens; a backward pass costs two forwards.)
The FLOP/s are those of one matrix product of the dtype that is computed in, the bandwidth that of a copy, measured on
the spot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.rows import Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from grpo_toolkit.model.hardware.model_sizes import ModelSizes
    from grpo_toolkit.step_time.seams.notes import ForwardNotes, RolloutNotes, StepNotes
    from grpo_toolkit.step_time.seen import Seen

OPTIMIZER_BYTES: Final = 28


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The measured speed of a device."""

    flops_per_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model in training, as far as its cost goes.

    Attributes:
        element_bytes: of a weight as it is computed with.
        trained: parameters that train; `tower_trains`: those of the vision tower among them.
        is_checkpointing: activations are computed again in the backward pass.
    """

    sizes: ModelSizes
    element_bytes: float
    trained: int
    tower_trains: bool
    is_checkpointing: bool

    @property
    def trained_share(self) -> float:
        """The share of the language model's weights that get a gradient."""
        return min(1.0, self.trained / max(self.sizes.decode_parameters, 1))


def work_of(notes: StepNotes, model: Model | None, seen: Seen | None) -> Work:
    """Return the work of a step by its notes; `seen` says how much of it was asked for only once."""
    forwards = [one for one in notes.forwards if one.phase == "forward"]
    others = [one for one in notes.forwards if one.phase != "forward"]
    flops = decode_bytes = None
    if model is not None:
        parts = _flops(notes, model, seen)
        flops = sum(value for name, value in parts.items() if name != "recompute")
        flops += 2.0 * model.sizes.decode_parameters * sum(one.rows * one.new_tokens for one in notes.rollouts)
        decode_bytes = _decode_bytes(notes.rollouts, model)
    return Work(
        rollouts=len(notes.rollouts),
        rollout_rows=sum(one.rows for one in notes.rollouts),
        prompt_tokens=max((one.prompt_tokens for one in notes.rollouts), default=0),
        decode_steps=sum(max(one.new_tokens - 1, 0) for one in notes.rollouts),
        forwards=len(forwards),
        forward_rows=sum(one.rows for one in forwards),
        forward_tokens=sum(one.rows * one.length for one in forwards),
        forward_patches=sum(one.patches for one in forwards),
        logprob_forwards=len(others),
        logprob_rows=sum(one.rows for one in others),
        logprob_tokens=sum(one.rows * one.length for one in others),
        flops=flops,
        decode_bytes=decode_bytes,
    )


def floors_of(notes: StepNotes, model: Model, machine: Machine, seen: Seen | None) -> dict[str, float]:
    """Return the seconds that physics asks for, by phase; of the rollout by its parts."""
    flops = _flops(notes, model, seen)
    floors = {
        "rollout/prefill": flops["prefill"] / machine.flops_per_s,
        "rollout/decode": _decode_bytes(notes.rollouts, model) / machine.bandwidth_bytes_per_s,
        "old_logprobs": flops["old_logprobs"] / machine.flops_per_s,
        "reference_logprobs": flops["reference_logprobs"] / machine.flops_per_s,
        "forward": flops["forward"] / machine.flops_per_s,
        "backward": (flops["backward"] + flops["recompute"]) / machine.flops_per_s,
        "optimizer": OPTIMIZER_BYTES * model.trained / machine.bandwidth_bytes_per_s,
    }
    return {name: seconds for name, seconds in floors.items() if seconds > 0}


def _flops(notes: StepNotes, model: Model, seen: Seen | None) -> dict[str, float]:
    """Return the FLOPs of each part; "recompute" is what checkpointing adds."""
    sizes = model.sizes
    share = _distinct_share(seen)
    forwards = [one for one in notes.forwards if one.phase == "forward"]
    text = {name: _text_flops([one for one in notes.forwards if one.phase == name], sizes) for name in _FORWARDS}
    pictures = {
        name: _vision_flops([one for one in notes.forwards if one.phase == name], sizes) * share for name in _FORWARDS
    }
    prompts = _distinct_prompts(notes, seen)
    prefill = sum(sizes.prefill_flops(one.prompt_tokens, batch_size=one.rows) for one in notes.rollouts) * prompts
    images = pictures["forward"] if forwards and notes.rollouts else 0.0
    tower = pictures["forward"] if model.tower_trains else 0.0
    return {
        "prefill": prefill + images,
        **{name: text[name] + pictures[name] for name in _FORWARDS},
        "backward": text["forward"] * (1 + model.trained_share) + 2 * tower,
        "recompute": (text["forward"] + tower) if model.is_checkpointing else 0.0,
    }


_FORWARDS: Final = ("forward", "old_logprobs", "reference_logprobs")


def _text_flops(forwards: Iterable[ForwardNotes], sizes: ModelSizes) -> float:
    return sum(
        sizes.prefill_flops(one.length, batch_size=one.rows)
        + 2.0 * sizes.head_parameters * max(one.kept - 1, 0) * one.rows
        for one in forwards
    )


def _vision_flops(forwards: Iterable[ForwardNotes], sizes: ModelSizes) -> float:
    return sum(one.images * sizes.vision_flops(round(one.patches / one.images)) for one in forwards if one.images)


def _distinct_share(seen: Seen | None) -> float:
    """Return how much of the images that a tower is given in a forward are different ones."""
    vision = None if seen is None else seen.vision
    return vision.distinct / vision.images if vision is not None and vision.distinct and vision.images else 1.0


def _distinct_prompts(notes: StepNotes, seen: Seen | None) -> float:
    rollout = None if seen is None else seen.rollout
    return rollout.distinct / rollout.rows if rollout is not None and rollout.distinct and rollout.rows else 1.0


def _decode_bytes(rollouts: Iterable[RolloutNotes], model: Model) -> float:
    sizes, total = model.sizes, 0.0
    cached = sizes.kv_bytes_per_token / max(sizes.element_bytes, 1) * model.element_bytes
    for one in rollouts:
        steps = max(one.new_tokens - 1, 0)
        weights = sizes.decode_parameters * model.element_bytes
        total += steps * (weights + cached * one.rows * (one.prompt_tokens + one.new_tokens / 2))
    return total
