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


def roofline_of(found: Measured, *, batch_size: int) -> Roofline | None:
    """Return the roofline of a measured arm; None where the hardware was not probed or the shape is not known.

    The throughput is the data sheet's where it has one for the model's dtype, else the measured one.
    """
    sizes, bandwidth = found.facts.sizes, found.hardware.get("bandwidth_bytes_per_s")
    timelines = [answer.timeline for answer in found.answers]
    if sizes is None or bandwidth is None or not timelines:
        return None
    prompt = int(statistics.median(t.prompt_tokens for t in timelines))
    output = statistics.median(max(t.output_lengths or [t.output_tokens]) for t in timelines)
    tpots = [t.tpot_s for t in timelines if t.tpot_s is not None]
    patches = 0 if found.evidence is None else found.evidence.patches
    first = [t.phases_s["prefill_s"] + t.phases_s["vision_s"] for t in timelines if "prefill_s" in t.phases_s]
    first_s = statistics.median(first) if first else None
    tpot_s = statistics.median(tpots) if tpots else None
    sheet = data_sheet(found.facts.environment.get("hardware", ""))
    # On average a step reads the cache as it is at half of the output.
    step_bytes = sizes.step_bytes(tokens=prompt + output / 2, batch_size=batch_size)
    floor_s = step_bytes / bandwidth
    prefill = sizes.prefill_flops(prompt, batch_size=batch_size)
    vision = batch_size * sizes.vision_flops(round(patches / batch_size)) if patches else 0.0
    peak = sheet.bfloat16_flops_per_s if sheet is not None and found.facts.dtype == "bfloat16" else None
    peak = peak or found.hardware.get("flops_per_s")
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
