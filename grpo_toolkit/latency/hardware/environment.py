"""What figures depend on and a reader must know: hardware, clocks, throttling, who else uses the GPU, versions."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_QUERY: Final = {
    "driver": "driver_version",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "gpu_utilization_percent": "utilization.gpu",
    "gpu_memory_used_mib": "memory.used",
}
"""Our names and nvidia-smi's."""

_THROTTLING: Final = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""What newer and older drivers call it; a name that nvidia-smi does not know makes it answer nothing at all."""

_IDLE: Final = 0x1
_THROTTLE_REASONS: Final = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
"""Bits of `clocks_throttle_reasons.active` (nvml.h, nvmlClocksEventReasons)."""


def environment_of(device: str) -> dict[str, str]:
    """What the figures of this process depend on, as text: hardware, threads, load, versions; of a GPU also clocks,
    throttling and other processes on it, where nvidia-smi is there."""
    import torch
    import transformers

    on_gpu = device.startswith("cuda")
    facts = {
        "hardware": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = f"{os.getloadavg()[0]:.2f}"
    if on_gpu:
        facts["cuda"] = str(torch.version.cuda)
        facts |= gpu_state(torch.device(device))
    return facts


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks, throttling, temperature, memory in use and processes of a GPU, now; {} without nvidia-smi.

    Processes are all that compute there, the measured ones among them: inside a container their numbers are others.
    """
    import torch

    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    # CUDA_VISIBLE_DEVICES renumbers; the UUID does not.
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    if not uuid:
        return {}
    card = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    state = _smi(program, card, f"--query-gpu={','.join(_QUERY.values())}")
    values = [part.strip() for part in state[0].split(",")] if state else []
    facts = dict(zip(_QUERY, values, strict=False))
    bits = next((found for name in _THROTTLING if (found := _smi(program, card, f"--query-gpu={name}"))), None)
    if bits:
        facts["throttle_reasons"] = throttle_reasons(bits[0].strip())
    facts["gpu_processes"] = str(len(_smi(program, card, "--query-compute-apps=pid")))
    return {
        name: value for name, value in facts.items() if value and "N/A" not in value and "Not Supported" not in value
    }


def throttle_reasons(bits: str) -> str:
    """nvidia-smi's bit field in words; "none" for an idle or free-running GPU."""
    try:
        value = int(bits, 16)
    except ValueError:
        return bits
    names = [name for bit, name in _THROTTLE_REASONS.items() if value & bit]
    return ", ".join(names) or ("none" if value & ~_IDLE == 0 else f"other ({bits})")


def probe_hardware(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The device's bandwidth and matrix throughput, measured on the spot; medians of seven.

    Returns:
        `bandwidth_bytes_per_s`: of copying one buffer into another, reads and writes counted; a decode step mostly
        reads, which is never slower. `flops_per_s`: of a square matrix product in `dtype`.
    """
    import torch

    on_gpu = device.type == "cuda"
    count = 1 << 30 if on_gpu else 1 << 27
    source = torch.ones(count // 2, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    copying = _median_seconds(functools.partial(target.copy_, source), device)
    side = 8192 if on_gpu else 1024
    one = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(one)
    multiplying = _median_seconds(functools.partial(torch.mm, one, one, out=product), device)
    del source, target, one, product
    if on_gpu:
        torch.cuda.empty_cache()
    return {"bandwidth_bytes_per_s": 2 * count / copying, "flops_per_s": 2 * side**3 / multiplying}


def _median_seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 7) -> float:
    import torch

    seconds = []
    for index in range(repeats + 2):
        if device.type == "cuda":
            begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            spent = float(begin.elapsed_time(end)) / 1e3
        else:
            start = time.perf_counter()
            work()
            spent = time.perf_counter() - start
        if index >= 2:
            seconds.append(spent)
    return statistics.median(seconds)


def _smi(program: str, card: str, query: str) -> list[str]:
    command = [program, "-i", card, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
