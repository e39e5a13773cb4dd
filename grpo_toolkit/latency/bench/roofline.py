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

import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.rows.row import Roofline

if TYPE_CHECKING:
    from grpo_toolkit.latency.engines.protocol import Measured

_PAGES: Final = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """The data of a GPU: bandwidth in bytes/s, bfloat16 FLOP/s (dense: half of what is given with sparsity)."""

    bandwidth_bytes_per_s: float
    bfloat16_flops_per_s: float
    source: str


# By words of the name that the driver gives; the first that fits counts, so the longer stand first.
DATA_SHEETS: Final = {
    "H200": DataSheet(bandwidth_bytes_per_s=4.8e12, bfloat16_flops_per_s=989.5e12, source=f"{_PAGES}h200/"),
    "H100 NVL": DataSheet(bandwidth_bytes_per_s=3.9e12, bfloat16_flops_per_s=835.5e12, source=f"{_PAGES}h100/"),
    "H100 PCIe": DataSheet(bandwidth_bytes_per_s=2.0e12, bfloat16_flops_per_s=756.5e12, source=f"{_PAGES}h100/"),
    "H100": DataSheet(bandwidth_bytes_per_s=3.35e12, bfloat16_flops_per_s=989.5e12, source=f"{_PAGES}h100/"),
    "A100-SXM4-80GB": DataSheet(bandwidth_bytes_per_s=2.039e12, bfloat16_flops_per_s=312e12, source=f"{_PAGES}a100/"),
    "A100 80GB PCIe": DataSheet(bandwidth_bytes_per_s=1.935e12, bfloat16_flops_per_s=312e12, source=f"{_PAGES}a100/"),
    "A100": DataSheet(bandwidth_bytes_per_s=1.555e12, bfloat16_flops_per_s=312e12, source=f"{_PAGES}a100/"),
    "A40": DataSheet(bandwidth_bytes_per_s=696e9, bfloat16_flops_per_s=149.7e12, source=f"{_PAGES}a40/"),
    "A10": DataSheet(bandwidth_bytes_per_s=600e9, bfloat16_flops_per_s=125e12, source=f"{_PAGES}products/a10-gpu/"),
    "L40S": DataSheet(bandwidth_bytes_per_s=864e9, bfloat16_flops_per_s=362.05e12, source=f"{_PAGES}l40s/"),
    "L4": DataSheet(bandwidth_bytes_per_s=300e9, bfloat16_flops_per_s=121e12, source=f"{_PAGES}l4/"),
}


def data_sheet(hardware: str) -> DataSheet | None:
    """Return the data sheet of a GPU by the name that its driver gives; None for one that is not in the table."""
    found = (sheet for name, sheet in DATA_SHEETS.items() if re.search(rf"\b{re.escape(name)}\b", hardware))
    return next(found, None)


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
