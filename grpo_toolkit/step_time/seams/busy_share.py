"""The share of time in which a device works, over a few decode steps of a rollout, by PyTorch's profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.seams.device_profile import DeviceProfile, covered

if TYPE_CHECKING:
    import torch

FIRST: Final = 3
"""The decode step from which on it is looked at: the first ones plan their kernels."""

STEPS: Final = 8


class BusyShare:
    """A profile of some decode steps of one rollout, begun and ended before one of them; the device is waited for.

    Args:
        device: that decodes.

    Attributes:
        share: of the time, 0 to 1, once the steps are over; None before, and where somebody else is profiling.
    """

    def __init__(self, device: torch.device) -> None:
        self.share: float | None = None
        self._device = device
        self._count = 0
        self._profile: DeviceProfile | None = None

    def before_step(self) -> None:
        """Count a decode step that is about to run."""
        self._count += 1
        if self._count == FIRST and DeviceProfile.is_free():
            self._profile = DeviceProfile(self._device)
        elif self._count == FIRST + STEPS:
            self.close()

    def close(self) -> None:
        """End the profile, if there is one, and work the share out."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        spans, wall_s = profile.close()
        self.share = covered((one.begin, one.end) for one in spans) / 1e6 / wall_s if wall_s > 0 else None
