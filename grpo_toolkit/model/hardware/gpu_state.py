"""The state of a GPU now: clocks, throttling, temperature, memory in use, processes.

Read by nvidia-ml-py where it is installed, else by nvidia-smi, which comes with every driver: the same figures of the
same library, NVML, in the same units.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
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

_READERS: Final[dict[str, Callable[[Any, Any], object]]] = {
    "driver": lambda nvml, _: nvml.nvmlSystemGetDriverVersion(),
    "clock_sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "clock_sm_max_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "clock_memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "power_w": lambda nvml, gpu: f"{nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3:.2f}",
    "gpu_utilization_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "gpu_memory_used_mib": lambda nvml, gpu: round(nvml.nvmlDeviceGetMemoryInfo(gpu, nvml.nvmlMemory_v2).used / 2**20),
    "throttle_reasons": lambda nvml, gpu: throttle_reasons(hex(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))),
    "gpu_processes": lambda nvml, gpu: len(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
}
"""The same by the functions of nvidia-ml-py."""

_THROTTLING: Final = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The names that newer and older drivers have for it; a name that nvidia-smi does not know makes it answer nothing."""

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


def gpu_state(device: torch.device) -> dict[str, str]:
    """Return the state of a GPU; {} where neither nvidia-ml-py nor nvidia-smi is there, and no key that it lacks.

    Processes are all that compute there, the measured ones among them: inside a container their numbers are others.
    """
    import torch

    # CUDA_VISIBLE_DEVICES renumbers; the UUID does not.
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    if not uuid:
        return {}
    card = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return by_nvml(card) or by_nvidia_smi(card)


def by_nvml(card: str) -> dict[str, str]:
    """Return the state of the GPU with this UUID by nvidia-ml-py; {} without that module or without a driver."""
    try:
        import pynvml
    except ImportError:
        return {}
    facts = {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(card)
        for name, read in _READERS.items():
            with suppress(pynvml.NVMLError):  # a GPU without such a sensor
                facts[name] = str(read(pynvml, gpu))
    return facts


def by_nvidia_smi(card: str) -> dict[str, str]:
    """Return the state of the GPU with this UUID by nvidia-smi; {} without that program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
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
    """Return NVML's bit field in words; "none" for an idle or free-running GPU."""
    try:
        value = int(bits, 16)
    except ValueError:
        return bits
    names = [name for bit, name in _THROTTLE_REASONS.items() if value & bit]
    return ", ".join(names) or ("none" if value & ~_IDLE == 0 else f"other ({bits})")


def _smi(program: str, card: str, query: str) -> list[str]:
    command = [program, "-i", card, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
