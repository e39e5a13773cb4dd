"""The attention kernel that a rollout decodes with.

PyTorch's SDPA prefers cuDNN's attention on Hopper, and cuDNN plans anew for every length of the KV cache that it has
not seen in this process. A decode step adds one to that length, and rollouts of fresh prompts meet new lengths all the
time, so a step of a few milliseconds waits for a plan of tens. Nothing reports it. Figures:
docs/benchmarks/training.md.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def plans_per_length(device: torch.device) -> bool:
    """Return whether cuDNN's planning slows down decoding on this device: measured on Hopper (capability 9)."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


class CudnnSwitch:
    """The process's switch of cuDNN's attention in SDPA: put back only by who has switched it off."""

    def __init__(self) -> None:
        self._is_ours = False

    def off(self) -> None:
        """Keep SDPA off cuDNN's attention from here on."""
        import torch

        backends: Any = torch.backends.cuda
        if backends.cudnn_sdp_enabled():
            self._is_ours = True
            backends.enable_cudnn_sdp(False)

    def back(self) -> None:
        """Let cuDNN's attention in again, if it was this switch that kept it out."""
        import torch

        if self._is_ours:
            torch.backends.cuda.enable_cudnn_sdp(True)
            self._is_ours = False


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Keep SDPA off cuDNN's attention inside, on devices where it plans for every length."""
    switch = CudnnSwitch()
    if plans_per_length(device):
        switch.off()
    try:
        yield
    finally:
        switch.back()


class DecodeWithoutCudnn:
    """A hook that keeps decode steps of a live model off cuDNN's attention; all else in a training goes on using it.

    A decode step is a forward of one token a sequence that wants no gradient. Prefill, log-probabilities and training
    are not touched, so the loss is the same to the last bit; sampled tokens may differ as they do between any two
    attention kernels.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        inner = base_model(model)
        self._cudnn = CudnnSwitch()
        self._hooks = LookingHooks("keeping decode steps off cuDNN's attention", put_back=self._after)
        self._hooks.before(inner, self._before)
        self._hooks.after(inner, self._after, always=True)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def _before(self, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        tokens = kwargs.get("input_ids")
        if tokens is None or tokens.shape[1] != 1 or torch.is_grad_enabled():
            return
        self._cudnn.off()

    def _after(self, *_: object) -> None:
        self._cudnn.back()
