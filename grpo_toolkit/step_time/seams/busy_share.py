"""The share of time in which a device works, over a few decode steps of a rollout, by PyTorch's profiler."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.hardware.synchronize import synchronize

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

FIRST: Final = 3
"""The decode step from which on it is looked at: the first ones plan their kernels."""

STEPS: Final = 8


class BusyShare:
    """A profile of some decode steps of one rollout, begun and ended before one of them; the device is waited for.

    Args:
        device: that decodes. On a CPU its operations count, as kernels do on a GPU.

    Attributes:
        share: of the time, 0 to 1, once the steps are over; None before, and where somebody else is profiling.
    """

    def __init__(self, device: torch.device) -> None:
        self.share: float | None = None
        self._device = device
        self._count = 0
        self._profile: Any = None
        self._began = 0.0

    def before_step(self) -> None:
        """Count a decode step that is about to run."""
        self._count += 1
        if self._count == FIRST:
            self._begin()
        elif self._count == FIRST + STEPS:
            self.close()

    def close(self) -> None:
        """End the profile, if there is one, and work the share out."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        synchronize(self._device)
        wall_s = time.perf_counter() - self._began
        profile.stop()
        spans = [
            (event.time_range.start, event.time_range.end) for event in profile.events() if self._is_counted(event)
        ]
        self.share = covered(spans) / 1e6 / wall_s if wall_s > 0 else None

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        # There is one profile a process, and a second one would end somebody else's without a word.
        autograd: Any = torch.autograd
        if autograd._profiler_enabled():
            return
        kind = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
        synchronize(self._device)
        self._profile = profile(activities=[kind])
        self._profile.start()
        synchronize(self._device)
        self._began = time.perf_counter()

    def _is_counted(self, event: Any) -> bool:
        return bool(event.device_type.name == self._device.type.upper())


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, which may overlap and come in any order."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(until - max(begin, end), 0.0)
        end = max(end, until)
    return total
