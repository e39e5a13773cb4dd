"""The facts that measured times depend on: hardware, versions, load, the state of the GPU.

That state (clocks, throttling, temperature, memory in use, processes) is read by nvidia-ml-py, NVML's own module,
where it is installed: `pip install 'grpo-toolkit[gpu]'`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.hardware.toolkit_commit import toolkit_commit

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_READERS: Final[dict[str, Callable[[Any, Any], object]]] = {
    "driver": lambda nvml, _: nvml.nvmlSystemGetDriverVersion(),
    "clock_sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "clock_sm_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "clock_memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "power_w": lambda nvml, gpu: f"{nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3:.2f}",
    "gpu_utilization_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "gpu_memory_used_mib": lambda nvml, gpu: round(nvml.nvmlDeviceGetMemoryInfo(gpu, nvml.nvmlMemory_v2).used / 2**20),
    "throttle_reasons": lambda nvml, gpu: throttle_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
    "gpu_processes": lambda nvml, gpu: len(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
}
"""Our names, and what reads each."""

_IDLE: Final = 0x1
_THROTTLE_REASONS: Final = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
"""The bits of NVML (nvml.h, nvmlClocksEventReasons)."""


def environment_of(device: str) -> dict[str, str]:
    """Return what the times of this process depend on, as text.

    That is hardware, threads, load, versions, and of a GPU its state (see `gpu_state`).
    """
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
    with contextlib.suppress(metadata.PackageNotFoundError):
        facts["grpo_toolkit"] = metadata.version("grpo-toolkit")
    if (commit := toolkit_commit()) is not None:
        facts["grpo_toolkit_commit"] = commit
    if hasattr(os, "getloadavg"):
        facts["load_average"] = f"{os.getloadavg()[0]:.2f}"
    if on_gpu:
        facts["cuda"] = str(torch.version.cuda)
        facts |= gpu_state(torch.device(device))
    return facts


def probe_hardware(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's bandwidth and matrix throughput; medians of seven.

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


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return the state of a GPU; {} without nvidia-ml-py or a driver, and no key that the GPU has no sensor for.

    Processes are all that compute there, the measured ones among them: inside a container their numbers are others.
    """
    import torch

    # CUDA_VISIBLE_DEVICES renumbers; the UUID does not.
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return state_of_card(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}") if uuid else {}


def state_of_card(card: str) -> dict[str, str]:
    """Return the state of the GPU with this UUID, as `gpu_state` does."""
    try:
        import pynvml
    except ImportError:
        return {}
    facts = {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(card)
        for name, read in _READERS.items():
            with suppress(pynvml.NVMLError):
                facts[name] = str(read(pynvml, gpu))
    return facts


def throttle_reasons(bits: int) -> str:
    """Return NVML's bit field in words; "none" for an idle or free-running GPU."""
    names = [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]
    return ", ".join(names) or ("none" if bits & ~_IDLE == 0 else f"other ({bits:#018x})")
