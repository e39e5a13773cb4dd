"""The close look at a step: tensors are compared, which waits for the device and takes some time of its own.

Done for a few steps alone, which say so in their rows. What is compared is not kept: a training may have no memory to
spare.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.attention.image_digests import equal_images
from grpo_toolkit.model.rollouts.shared_prefill import distinct_rows
from grpo_toolkit.step_time.seams.attention_calls import calls_when_packed
from grpo_toolkit.step_time.seen import RolloutSeen, Seen, VisionSeen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from grpo_toolkit.step_time.seams.notes import RolloutNotes, StepNotes, VisionNotes
    from grpo_toolkit.step_time.seen import Settings

PASSES: Final = 2
"""Passes of a vision tower in a step whose images are compared."""


def look_at_rollout(notes: RolloutNotes, call: Mapping[str, Any], output: Any, model: Any) -> None:
    """Note which prompts of a rollout are copies, and how long its completions are."""
    import torch

    inputs = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    config = call.get("generation_config") or model.generation_config
    notes.cap = getattr(config, "max_new_tokens", None)
    if "input_ids" not in inputs:
        return
    if "attention_mask" in inputs:
        notes.distinct = distinct_rows(model.config, inputs).count
        notes.padding = padding_of([inputs["attention_mask"]])
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    ends = getattr(config, "eos_token_id", None)
    ends = getattr(model.generation_config, "eos_token_id", None) if ends is None else ends
    if sequences is not None:
        notes.lengths = _lengths(sequences[:, notes.prompt_tokens :], ends)


def distinct_images(patches: torch.Tensor, grid: torch.Tensor | None) -> int | None:
    """Return how many of the images that a tower is given are different ones."""
    import torch

    if grid is not None:
        found = equal_images(patches, grid)
        return None if found is None else len(set(found[1]))
    return int(torch.unique(patches.detach().reshape(patches.shape[0], -1), dim=0).shape[0])


def look_closely(notes: StepNotes, model: Any, *, towers: Sequence[Any], settings: Settings) -> Seen:
    """Return what a step's notes say without a clock.

    Args:
        notes: of a step that was looked at closely.
        model: the transformers model inside all wrappers.
        towers: its vision towers.
        settings: of the training.
    """
    masks = [one.mask for one in notes.forwards if one.phase == "forward" and one.mask is not None]
    logits = [one.logits_bytes for one in notes.forwards if one.logits_bytes is not None]
    return Seen(
        rollout=_rollouts(notes.rollouts),
        vision=_vision(notes.vision, towers, device=model.device.type),
        settings=settings,
        padding=padding_of(masks),
        logits_bytes=max(logits) if logits else None,
        processed=notes.processed,
        processed_distinct=len({_digest(picture) for picture in notes.pictures}) if notes.pictures else None,
        rewards_cpu={name: busy / wall for name, (wall, busy) in notes.rewards_cpu.items() if wall > 0},
        is_gpu=model.device.type == "cuda",
        kernels=notes.kernels,
    )


def padding_of(masks: Sequence[torch.Tensor]) -> float | None:
    """Return the share of zeros in attention masks of two dimensions; None where there are none of these."""
    flat = [mask for mask in masks if getattr(mask, "ndim", 0) == 2]
    if not flat or len(flat) < len(masks):
        return None
    seen = sum(int(mask.sum()) for mask in flat)
    return 1.0 - seen / sum(mask.numel() for mask in flat)


def _rollouts(rollouts: Sequence[RolloutNotes]) -> RolloutSeen | None:
    if not rollouts:
        return None
    first = rollouts[0]
    paddings = [one.padding for one in rollouts if one.padding is not None]
    is_fast = first.engine == "fast"
    later = first.step_lengths[1:]
    return RolloutSeen(
        engine=first.engine,
        rows=sum(one.rows for one in rollouts),
        distinct=_sum(one.distinct for one in rollouts),
        prefilled=_sum(one.prefilled for one in rollouts),
        padding=sum(paddings) / len(paddings) if paddings else None,
        is_cached=True if is_fast else all(length == 1 for length in later) if later else None,
        lengths=tuple(tuple(one.lengths) for one in rollouts if one.lengths),
        cap=first.cap,
        cast_bytes=0 if is_fast else first.cast_bytes,
        is_planned_anew=not is_fast and first.is_planned_anew,
        busy=None if first.busy is None else first.busy.share,
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    found = list(counts)
    return None if None in found else sum(count or 0 for count in found)


def _lengths(tokens: torch.Tensor, ends: Any) -> list[int]:
    """Return the tokens of each completion, up to and with the one that ends it."""
    import torch

    if ends is None or tokens.shape[1] == 0:
        return [int(tokens.shape[1])] * int(tokens.shape[0])
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device).reshape(-1))
    first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    return [int(length) for length in first.tolist()]


def _vision(passes: Sequence[VisionNotes], towers: Sequence[Any], *, device: str) -> VisionSeen | None:
    if not passes:
        return None
    compared = [one for one in passes if one.distinct is not None]
    lengths, layers = passes[0].attention_lengths, sum(len(tower.layers) for tower in towers)
    return VisionSeen(
        images=sum(one.images for one in compared or passes) / len(compared or passes),
        distinct=sum(one.distinct or 0 for one in compared) / len(compared) if compared else None,
        attention_calls=None if lengths is None else len(lengths),
        attention_layers=layers,
        packed_calls=None if lengths is None else calls_when_packed(lengths, layers=layers, device=device),
        is_frozen=not any(parameter.requires_grad for tower in towers for parameter in tower.module.parameters()),
        wants_gradient=any(one.wants_gradient for one in passes),
    )


def _digest(picture: Any) -> object:
    """Return what equal pictures have in common."""
    content = picture.tobytes() if hasattr(picture, "tobytes") else repr(picture).encode()
    shape = tuple(picture.shape) if hasattr(picture, "shape") else getattr(picture, "size", None)
    return shape, hashlib.blake2b(content, digest_size=16).digest()
