"""What makers say of their GPUs: memory bandwidth and dense matrix throughput, with where they say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """One GPU: bandwidth in bytes/s, dense bfloat16 throughput in FLOP/s (None: the maker gives it sparse or not)."""

    bandwidth_bytes_per_s: float
    bfloat16_flops_per_s: float | None
    source: str


_HOPPER = "https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306"
_AMPERE = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"

# By a part of the name that the driver gives; the first that fits counts, so the longer stand first.
DATA_SHEETS: Final = {
    "GH200 480GB": DataSheet(
        bandwidth_bytes_per_s=4.0e12,
        bfloat16_flops_per_s=989.5e12,
        source="https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip",
    ),
    "H200": DataSheet(
        bandwidth_bytes_per_s=4.8e12,
        bfloat16_flops_per_s=989.5e12,
        source="https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
    ),
    "H100 NVL": DataSheet(bandwidth_bytes_per_s=3.9e12, bfloat16_flops_per_s=835.5e12, source=_HOPPER),
    "H100 PCIe": DataSheet(bandwidth_bytes_per_s=2.0e12, bfloat16_flops_per_s=756.5e12, source=_HOPPER),
    "H100": DataSheet(bandwidth_bytes_per_s=3.35e12, bfloat16_flops_per_s=989.5e12, source=_HOPPER),
    "A100-SXM4-80GB": DataSheet(bandwidth_bytes_per_s=2.039e12, bfloat16_flops_per_s=312e12, source=_AMPERE),
    "A100 80GB PCIe": DataSheet(bandwidth_bytes_per_s=1.935e12, bfloat16_flops_per_s=312e12, source=_AMPERE),
    "A100": DataSheet(bandwidth_bytes_per_s=1.555e12, bfloat16_flops_per_s=312e12, source=_AMPERE),
    "A40": DataSheet(
        bandwidth_bytes_per_s=696e9,
        bfloat16_flops_per_s=149.7e12,
        source="https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    ),
    "A10G": DataSheet(
        bandwidth_bytes_per_s=600e9,
        bfloat16_flops_per_s=70e12,
        source="https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    "A10": DataSheet(
        bandwidth_bytes_per_s=600e9,
        bfloat16_flops_per_s=125e12,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
    ),
    "L40S": DataSheet(
        bandwidth_bytes_per_s=864e9,
        bfloat16_flops_per_s=362.05e12,
        source="https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
    ),
    "L4": DataSheet(
        bandwidth_bytes_per_s=300e9,
        bfloat16_flops_per_s=121e12,
        source="https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet",
    ),
    "Tesla T4": DataSheet(
        bandwidth_bytes_per_s=320e9,
        bfloat16_flops_per_s=None,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
    ),
    "Tesla V100": DataSheet(
        bandwidth_bytes_per_s=900e9,
        bfloat16_flops_per_s=None,
        source="https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    ),
    "RTX 4090": DataSheet(
        bandwidth_bytes_per_s=1.008e12,
        bfloat16_flops_per_s=165.2e12,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    "RTX 3090": DataSheet(
        bandwidth_bytes_per_s=936e9,
        bfloat16_flops_per_s=71e12,
        source="https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
}


def data_sheet(hardware: str) -> DataSheet | None:
    """The data sheet of a GPU by the name that its driver gives; None for one that is not in the table."""
    return next((sheet for name, sheet in DATA_SHEETS.items() if name in hardware), None)
