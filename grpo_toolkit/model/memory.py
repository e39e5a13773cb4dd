"""Free memory and its peaks: asked before a load, so that a model too large costs a line and not the machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo

# Activations, the KV cache of a short answer, and the logits, over what the weights take.
_HEADROOM: Final = 1.1

_CONTEXT_BYTES: Final = 1_500_000_000
"""The bytes that a process takes on a GPU beside the weights: its context, kernels, and a few requests' cache."""


def why_too_large(tensors: Mapping[str, TensorInfo], device: str) -> str | None:
    """Return why a model cannot be loaded on a device, in a few words; None where it can, or that is not known."""
    needed = _HEADROOM * sum(info.nbytes for info in tensors.values())
    free = free_bytes(device)
    if free is None or needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB are needed to load it and {free / 1e9:.1f} GB are free on {device}"


def process_bytes(folder: Path) -> int:
    """Return the bytes that a process takes on a GPU if it loads a folder's model, an adapter's with its base."""
    checkpoint = open_checkpoint(folder)
    found = [checkpoint]
    if checkpoint.kind is Kind.ADAPTER:
        found.append(open_checkpoint(base_of_adapter(folder)))
    return _CONTEXT_BYTES + sum(info.nbytes for one in found for info in one.tensors().values())


def free_bytes(device: str) -> int | None:
    """Return the memory that a new process could take on a device, or None where that is not known."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device != "cpu":
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def room_bytes(device: str) -> int | None:
    """Return the memory that this process could still take on a device, what its allocator keeps free included."""
    if not device.startswith("cuda"):
        return free_bytes(device)
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


# psutil has neither a peak nor its reset. On Linux `ru_maxrss` will not do: it begins with the peak of the process
# that this one was forked from, which no reset takes away.
def reset_resident_peak() -> None:
    """Begin a new resident peak, where the kernel allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 (a kernel switch, not a path to read)
            file.write("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def resident_peak() -> int:
    """Return the process's resident peak in bytes since the last reset."""
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
