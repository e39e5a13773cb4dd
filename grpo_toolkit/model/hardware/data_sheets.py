"""The maker's figures of its GPUs: memory bandwidth and dense matrix throughput, with their sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_PAGES: Final = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """One GPU: bandwidth in bytes/s, bfloat16 throughput in FLOP/s (dense: half of what is given with sparsity)."""

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
