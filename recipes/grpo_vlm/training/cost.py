"""The cost of a run: the time of a step, and the GPU memory at its peak beside the preflight's estimate of it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_vlm.planning.memory import GIB
from grpo_vlm.training.screen import above_bar

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments


class CostCallback(TrainerCallback):
    """A callback that times every step, rollouts included, and notes the peak of memory to the end of the last one.

    A step begins where the one before it has been logged, evaluated and saved: the trainer reads the rows of all its
    micro-batches, images included, before it calls `on_step_begin`. The first step of a process also plans kernels and
    makes Adam's states: the median leaves it out where there are more. Waiting for the GPU at both ends of a step
    costs nothing: its loss is read there anyway.

    Args:
        estimated_bytes (`float`, *optional*):
            The preflight's (`memory.Estimate.allocated`). None leaves memory out: where vLLM sleeps in this process,
            torch counts as allocated what vLLM has given back to the GPU.
    """

    def __init__(self, estimated_bytes: float | None) -> None:
        self.estimated_bytes = estimated_bytes
        self.steps_s: list[float] = []
        self.peak_bytes = 0
        self._device: torch.device | None = None
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._device = args.device
        if args.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(args.device)  # the baselines before it are not training
        self._began = self._now()

    def _begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = self._now()

    on_log = on_evaluate = on_save = _begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = self._now()
        self.steps_s.append(now - self._began)
        self._began = now
        if args.device.type == "cuda":
            import torch

            self.peak_bytes = torch.cuda.max_memory_allocated(args.device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the figures before the export, which takes a while; without a GPU, the bar's last line has them."""
        figures = self.figures()
        if not state.is_world_process_zero or figures["step_s"] is None or figures["peak_gib"] is None:
            return
        peak, estimated = figures["peak_gib"], figures["estimated_gib"]
        line = f"{len(self.steps_s)} steps of {figures['step_s']:.2f} s; GPU memory {peak:.1f} GiB at the peak"
        above_bar(f"{'cost':<12}{line}, {estimated:.1f} estimated")

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def figures(self) -> dict[str, float | None]:
        """Return seconds and GiB of this process for `summary.json`; None without a GPU or an estimate."""
        timed = self.steps_s[1:] or self.steps_s
        step_s = statistics.median(timed) if timed else None
        if not self.peak_bytes or self.estimated_bytes is None:
            return {"step_s": step_s, "peak_gib": None, "estimated_gib": None}
        return {"step_s": step_s, "peak_gib": self.peak_bytes / GIB, "estimated_gib": self.estimated_bytes / GIB}
