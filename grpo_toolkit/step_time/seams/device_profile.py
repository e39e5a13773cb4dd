"""A profile of what a device does for a while, by PyTorch's profiler: spans with names, and how much they cover."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_toolkit.model.hardware.synchronize import synchronize

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class Span(NamedTuple):
    """A kernel, copy or (on a CPU) operation: its name, and when it began and ended in microseconds."""

    name: str
    begin: float
    end: float


class DeviceProfile:
    """A profile that runs from its making to `close`, before and after which the device is waited for.

    Args:
        device: that works. On a CPU its operations count, as kernels do on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._device = device
        kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        synchronize(device)
        self._profile: Any = profile(activities=[kind])
        self._profile.start()
        synchronize(device)
        self._began = time.perf_counter()

    @staticmethod
    def is_free() -> bool:
        """Return whether nobody is profiling: a second profile would end the first without a word."""
        import torch

        autograd: Any = torch.autograd
        return not autograd._profiler_enabled()

    def close(self) -> tuple[list[Span], float]:
        """End the profile; return what the device did, and the seconds of the whole."""
        synchronize(self._device)
        wall_s = time.perf_counter() - self._began
        self._profile.stop()
        kind = self._device.type.upper()
        spans = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.device_type.name == kind
        ]
        return spans, wall_s


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, which may overlap and come in any order."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(until - max(begin, end), 0.0)
        end = max(end, until)
    return total
