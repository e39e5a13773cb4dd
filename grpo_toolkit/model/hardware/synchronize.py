"""Waiting for a device, as every clock beside a GPU has to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has done what it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
