"""The memory of a plan, in lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_vlm.planning.memory import GIB

if TYPE_CHECKING:
    from grpo_vlm.planning.memory import Estimate


def memory_lines(memory: Estimate, *, free: float | None, vllm_bytes: float) -> list[str]:
    """Return what an estimate says, a line each.

    Args:
        memory: the estimate.
        free: bytes that are free on the GPU; None without one.
        vllm_bytes: the least that vLLM needs.
    """
    moments = memory.moments
    largest = max(moments, key=lambda name: moments[name]) if len(moments) > 1 else None
    lines = [
        *(f"memory      {gib(amount):>9}  {name}" for name, amount in memory.parts.items()),
        *(
            f"memory      {gib(amount):>9}  {name}{' (the larger counts)' if name == largest else ''}"
            for name, amount in moments.items()
        ),
    ]
    peak = f"memory      {gib(memory.allocated):>9}  at the peak"
    if not memory.share:
        compared = "no GPU here to compare with" if free is None else f"{gib(free)} free"
        return [*lines, f"{peak}; {gib(memory.needed)} to have ({compared})"]
    when = "while it answers" if memory.sleeps else "all the time"
    gpu = memory.smallest_gpu(vllm_bytes)
    enough = f"{gib(gpu):>9}  the smallest GPU for both (none here to compare with)"
    if gpu == float("inf"):
        enough = f"{'no':>9}  GPU is large enough for both: lower --vllm_gpu_memory_utilization"
    return [
        *lines,
        f"{peak}, vLLM aside; {gib(memory.needed)} to have",
        f"memory      {memory.share:>9.0%}  of the GPU for vLLM {when}, {gib(vllm_bytes)} at least",
        f"memory      {enough}",
    ]


def gib(amount: float) -> str:
    """Return bytes in GiB, or in MiB where they are few."""
    if amount < 0.05 * GIB:
        return f"{amount / 2**20:,.0f} MiB"
    return f"{amount / GIB:,.1f} GiB"
