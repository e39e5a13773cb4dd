"""Causes in the vision tower and in what is done to images before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.causes.cause import PACKED, Cause, Found, vision_in

if TYPE_CHECKING:
    from grpo_toolkit.step_time.causes.cause import Mean
    from grpo_toolkit.step_time.seen import Seen

LAUNCHES_A_CALL: Final = 6
LAUNCHES_A_LAYER: Final = 20
"""Kernels of a segment's own attention (split, transpose, attend, join), and of all else in a tower's layer."""


def _windows(seen: Seen, mean: Mean) -> Found | None:
    vision = vision_in(seen)
    if vision is None or not vision.attention_calls or not vision.attention_layers:
        return None
    calls = vision.attention_calls / vision.attention_layers
    left = 1.0 if vision.packed_calls is None else vision.packed_calls / vision.attention_layers
    if calls - left < 1:
        return None
    launched = LAUNCHES_A_CALL * calls + LAUNCHES_A_LAYER
    share = LAUNCHES_A_CALL * (calls - left) / launched
    return Found(
        evidence=f"{vision.attention_calls:,} attention calls in one pass of the vision tower over "
        f"{vision.images:.0f} images: {calls:.0f} a layer, one for each window or image",
        savings_s=_of_tower(mean, share),
    )


def _images_again(seen: Seen, mean: Mean) -> Found | None:
    vision = vision_in(seen)
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
    vision = vision_in(seen)
    if vision is None or not (vision.is_frozen and vision.wants_gradient):
        return None
    forward = mean.seconds("forward")
    share = mean.seconds("forward/vision") / forward if forward > 0 else 0.0
    return Found(
        evidence="no weight of the vision tower trains, and its output wants a gradient: it is backpropagated",
        savings_s={"backward": share * mean.seconds("backward")},
    )


def _processed_again(seen: Seen, mean: Mean) -> Found | None:
    if not seen.processed_distinct or seen.processed <= seen.processed_distinct:
        return None
    share = 1.0 - seen.processed_distinct / seen.processed
    return Found(
        evidence=f"the image processor is given {seen.processed} images a step, {seen.processed_distinct} of them "
        "different",
        savings_s={"image_processing": share * mean.seconds("image_processing")},
    )


CAUSES: Final = (
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
        name="images-processed-again",
        title="images processed again and again",
        rule=_processed_again,
        cure="process each distinct image of a step once, and keep the result",
        line=PACKED,
    ),
)
