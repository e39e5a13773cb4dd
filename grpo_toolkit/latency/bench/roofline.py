"""The roofline: the time that physics allows, beside the time that was measured.

A decode step of a small batch is bound by memory: it reads every weight of the language model once, and the KV cache
of every sequence.

    floor of TPOT = bytes of a decode step / bandwidth;   MBU = floor / TPOT;   gap = TPOT - floor
    MFU of the prefill = (its FLOPs + the vision tower's) / (their time x peak FLOP/s)

(Williams et al. 2009, doi:10.1145/1498765.1498785; MBU as Databricks defines it,
https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices.) The bandwidth is measured on the
spot, by copying, and stands beside the maker's figure. The floor uses the measured one: what a kernel really gets.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from grpo_toolkit.latency.rows.row import Roofline
from grpo_toolkit.model.hardware.data_sheets import data_sheet

if TYPE_CHECKING:
    from grpo_toolkit.latency.engines.protocol import Measured
    from grpo_toolkit.model.hardware.model_sizes import ModelSizes


def roofline_of(found: Measured, *, batch_size: int) -> Roofline | None:
    """Return the roofline of a measured arm; None where the hardware was not probed or the shape is not known."""
    sizes, bandwidth = found.facts.sizes, found.hardware.get("bandwidth_bytes_per_s")
    timelines = [answer.timeline for answer in found.answers]
    if sizes is None or bandwidth is None or not timelines:
        return None
    prompt = int(statistics.median(t.prompt_tokens for t in timelines))
    output = statistics.median(max(t.output_lengths or [t.output_tokens]) for t in timelines)
    tpots = [t.tpot_s for t in timelines if t.tpot_s is not None]
    patches = 0 if found.evidence is None else found.evidence.patches
    first = [t.phases_s["prefill_s"] + t.phases_s["vision_s"] for t in timelines if "prefill_s" in t.phases_s]
    return roofline(
        sizes,
        hardware=found.facts.environment.get("hardware", ""),
        bandwidth=bandwidth,
        flops=found.hardware.get("flops_per_s"),
        is_bfloat16=found.facts.dtype == "bfloat16",
        prompt_tokens=prompt,
        output_tokens=output,
        batch_size=batch_size,
        patches=patches,
        tpot_s=statistics.median(tpots) if tpots else None,
        first_s=statistics.median(first) if first else None,
    )


def roofline(
    sizes: ModelSizes,
    *,
    hardware: str,
    bandwidth: float,
    flops: float | None,
    is_bfloat16: bool,
    prompt_tokens: int,
    output_tokens: float,
    batch_size: int = 1,
    patches: int = 0,
    tpot_s: float | None = None,
    first_s: float | None = None,
) -> Roofline:
    """Return the roofline of a model's shape on a device.

    Args:
        sizes: the model's.
        hardware: the device's name, for the data sheet.
        bandwidth: bytes/s, measured.
        flops: FLOP/s of a matrix product, measured; used where the data sheet has none for the dtype.
        is_bfloat16: whether the data sheet's throughput is that of the model's dtype.
        prompt_tokens: of each sequence; decoding reads on average the cache at half of the output.
        output_tokens: of each sequence.
        batch_size: sequences.
        patches: image patches of the whole batch.
        tpot_s: measured time per output token.
        first_s: measured time of vision tower and prefill together.
    """
    sheet = data_sheet(hardware)
    step_bytes = sizes.step_bytes(tokens=prompt_tokens + output_tokens / 2, batch_size=batch_size)
    floor_s = step_bytes / bandwidth
    prefill = sizes.prefill_flops(prompt_tokens, batch_size=batch_size)
    vision = batch_size * sizes.vision_flops(round(patches / batch_size)) if patches else 0.0
    peak = sheet.bfloat16_flops_per_s if sheet is not None and is_bfloat16 else None
    peak = peak or flops
    return Roofline(
        bytes_per_step=step_bytes,
        bandwidth_bytes_per_s=bandwidth,
        datasheet_bytes_per_s=None if sheet is None else sheet.bandwidth_bytes_per_s,
        floor_tpot_s=floor_s,
        mbu=None if tpot_s is None else floor_s / tpot_s,
        prefill_flops=prefill,
        vision_flops=vision if patches else None,
        peak_flops_per_s=peak,
        mfu=None if peak is None or first_s is None else (prefill + vision) / (first_s * peak),
        gap_s=None if tpot_s is None else tpot_s - floor_s,
    )
