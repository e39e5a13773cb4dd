"""Causes that a profile of the device shows: what it waits for, and what it is slow at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.causes.cause import Cause, Found, plain_rollout
from grpo_toolkit.step_time.rows import NO_CURE

if TYPE_CHECKING:
    from grpo_toolkit.step_time.causes.cause import Mean
    from grpo_toolkit.step_time.seen import Seen

IDLE: Final = 0.1
BETWEEN: Final = 0.1
"""Shares of a micro-batch's time from which on each is a cause."""

FUSED: Final = 0.75
"""The share of the time between matrix products that fusing saves: compiled decoder layers took 26% off a micro-batch
a third of which lay between them (3B shape, one H200)."""

_PASSES: Final = ("old_logprobs", "reference_logprobs", "forward", "backward")
_KERNELS: Final = "https://huggingface.co/docs/transformers/kernel_doc/overview"


def _launches(seen: Seen, mean: Mean) -> Found | None:
    kernels = seen.kernels
    if not seen.is_gpu or kernels is None or kernels.idle < IDLE:
        return None
    return Found(
        evidence=f"in the forward and backward of a micro-batch the GPU works for {1 - kernels.idle:.0%} of the time, "
        "and waits for the next kernel to be launched in the rest",
        savings_s={name: kernels.idle * mean.seconds(name) for name in _PASSES},
    )


def _between(seen: Seen, mean: Mean) -> Found | None:
    kernels = seen.kernels
    if not seen.is_gpu or kernels is None or kernels.between < BETWEEN:
        return None
    share = FUSED * kernels.between / (1 - kernels.idle)
    return Found(
        evidence=f"norms, rotary positions, casts, activations: {kernels.between:.0%} of a micro-batch's time goes to "
        f"kernels between its matrix products ({kernels.products:.0%}) and attention ({kernels.attention:.0%})",
        savings_s={name: share * mean.seconds(name) for name in _PASSES},
    )


def _below_peak(seen: Seen, mean: Mean) -> Found | None:
    """See all that is left of the passes: a profile has shown that the device is at work."""
    kernels = seen.kernels
    time = mean.seconds("forward") + mean.seconds("backward")
    floor = mean.floors_s.get("forward", 0.0) + mean.floors_s.get("backward", 0.0)
    if not seen.is_gpu or kernels is None or not floor or not time:
        return None
    computing = (kernels.products + kernels.attention) * time
    reached = f" at {floor / computing:.0%} of the speed of one large product" if computing > floor else ""
    return Found(
        evidence=f"matrix products and attention take {kernels.products + kernels.attention:.0%} of a micro-batch"
        f"{reached}, at the shapes that it has",
        savings_s={name: mean.seconds(name) for name in (*_PASSES, "rollout/prefill") if name in mean.floors_s},
    )


def _decoding(seen: Seen, mean: Mean) -> Found | None:
    rollout = plain_rollout(seen)
    floor, decode = mean.floors_s.get("rollout/decode"), mean.seconds("rollout/decode")
    if not seen.is_gpu or seen.kernels is None or rollout is None or not floor or rollout.is_cached is False:
        return None
    steps = max(mean.decode_steps, 1.0)
    return Found(
        evidence=f"a decode step takes {decode / steps * 1e3:.1f} ms where reading weights and KV cache takes "
        f"{floor / steps * 1e3:.1f}: one token a sequence leaves its kernels short",
        savings_s={"rollout/decode": decode},
    )


def _host(seen: Seen, mean: Mean) -> Found | None:
    names = ("texts", "preparing", "image_processing")
    shares = {name: mean.share(name) for name in names}
    if not seen.is_gpu or seen.kernels is None or sum(shares.values()) < IDLE / 2:
        return None
    return Found(
        evidence=f"templates and tokenising ({shares['texts']:.0%} of the step), what the trainer prepares "
        f"({shares['preparing']:.0%}) and images ({shares['image_processing']:.0%}) are worked on while the GPU idles",
        savings_s={name: mean.seconds(name) for name in names},
    )


CAUSES: Final = (
    Cause(
        name="passes-launched-by-kernel",
        title="forward and backward wait for launches",
        rule=_launches,
        cure="train more rows at once",
        line="per_device_train_batch_size=...",
    ),
    Cause(
        name="kernels-between-products",
        title="small kernels between the matrix products",
        rule=_between,
        cure="fuse them with kernels from the Hub",
        line='model_init_kwargs={"use_kernels": True}',
        link=_KERNELS,
    ),
    Cause(
        name="inputs-prepared-in-line",
        title="inputs prepared while the GPU idles",
        rule=_host,
        cure=f"{NO_CURE}: the trainer prepares the texts of each completion between its passes",
    ),
    Cause(
        name="decoding-below-bandwidth",
        title="decode steps slower than their reading",
        rule=_decoding,
        cure=f"{NO_CURE}: a step of more sequences takes little longer, so a larger rollout costs less a token",
    ),
    Cause(
        name="passes-below-peak",
        title="matrix products and attention below peak speed",
        rule=_below_peak,
        cure=f"{NO_CURE}: longer or larger micro-batches come nearer",
    ),
)
