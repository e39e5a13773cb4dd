"""The cost of a cause by physics: bytes over bandwidth, FLOPs over throughput, on top of the base's own time.

    prefill: FLOPs of the prompt and of the vision tower / FLOP/s
    a step:  bytes of weights and KV cache / bandwidth; without a cache the FLOPs of the whole sequence / FLOP/s

What the base takes beyond that (launching kernels, Python) is taken as it was measured. On a GPU it runs while the
device computes, so a step takes the longer of the two, which is why a lost cache can be free there; on a CPU they add
up. Nothing is predicted for causes that change neither bytes nor FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.explain.effects import arms_of, shares
from grpo_toolkit.latency.explain.facts import mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grpo_toolkit.latency.explain.effects import Arm
    from grpo_toolkit.latency.explain.facts import Facts
    from grpo_toolkit.model.hardware.model_sizes import ModelSizes

PREDICTABLE: Final = frozenset({"cache-off", "float32", "unmerged-adapter", "pixel-limits", "eos", "longer-answers"})
"""Causes that change bytes, FLOPs or the number of steps."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of an arm for one answer.

    Attributes:
        parameters: of the language model that every step reads.
        element_bytes: of a weight, and of a value of the KV cache.
        prompt_tokens, output_tokens: of one answer.
        patches: of its images.
        is_cached: whether a step computes one token, or all.
        sizes: the base's shape.
    """

    parameters: int
    element_bytes: float
    prompt_tokens: float
    output_tokens: float
    patches: float
    is_cached: bool
    sees_again: bool
    sizes: ModelSizes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The measured speed of a device, and the base's times on it.

    Attributes:
        bandwidth: in bytes/s.
        flops: in FLOP/s.
        overlaps: whether kernels are launched while earlier ones compute, so that the launches cost no time.
        base_ttft_s: the base's time to the first token.
        base_tpot_s: the base's time per output token.
    """

    bandwidth: float
    flops: float
    overlaps: bool
    base_ttft_s: float
    base_tpot_s: float


def predicted_effects(
    causes: Sequence[str],
    base: Facts,
    trained: Facts,
    tokens: Mapping[Arm, float],
    machine: Machine,
) -> dict[str, float]:
    """Return what each predictable cause should cost, split among causes as measured effects are.

    Args:
        causes: those that were toggled.
        base, trained: what is known of the two.
        tokens: mean output tokens of each arm.
        machine: see `Machine`.
    """
    if base.sizes is None or trained.sizes is None:
        return {}
    works = {arm: _work(arm, base, trained, base.sizes, trained.sizes, tokens[arm]) for arm in arms_of(causes)}
    nothing = works[frozenset()]
    values = {arm: _seconds(work, nothing, machine) for arm, work in works.items()}
    return {name: value for name, value in shares(causes, values).items() if name in PREDICTABLE}


def _work(arm: Arm, base: Facts, trained: Facts, ours: ModelSizes, theirs: ModelSizes, tokens: float) -> Work:
    """Return the trained model's work with the causes of `arm` on and everything else as in the base."""
    pixels = trained if "pixel-limits" in arm else base
    wide = theirs if "float32" in arm else ours
    return Work(
        parameters=theirs.decode_parameters if "unmerged-adapter" in arm else ours.decode_parameters,
        element_bytes=wide.decode_bytes / wide.decode_parameters,
        prompt_tokens=mean(pixels.prompt_tokens),
        output_tokens=tokens,
        patches=pixels.patches,
        is_cached="cache-off" not in arm,
        sees_again=(trained.proof.vision_calls or 0) > 1,
        sizes=ours,
    )


def _seconds(work: Work, base: Work, machine: Machine) -> float:
    prefill = (_prefill_flops(work) - _prefill_flops(base)) / machine.flops
    steps = max(work.output_tokens - 1, 0)
    return machine.base_ttft_s + prefill + steps * _step(work, base, machine)


def _prefill_flops(work: Work) -> float:
    return _flops(work, work.prompt_tokens) + work.sizes.vision_flops(round(work.patches))


def _flops(work: Work, tokens: float) -> float:
    extra = work.parameters - work.sizes.decode_parameters  # an adapter's, beside the base
    return work.sizes.prefill_flops(round(tokens)) + 2 * extra * tokens


def _step(work: Work, base: Work, machine: Machine) -> float:
    floor, usual = _floor(work, machine), _floor(base, machine)
    if machine.overlaps:
        return max(machine.base_tpot_s, floor)
    return machine.base_tpot_s + max(0.0, floor - usual)


def _floor(work: Work, machine: Machine) -> float:
    length = work.prompt_tokens + work.output_tokens / 2
    weights = work.parameters * work.element_bytes
    cached = work.sizes.kv_bytes_per_token / work.sizes.element_bytes * work.element_bytes * length
    if work.is_cached:
        return (weights + cached) / machine.bandwidth
    flops = _flops(work, length) + (work.sizes.vision_flops(round(work.patches)) if work.sees_again else 0.0)
    return max(weights / machine.bandwidth, flops / machine.flops)
