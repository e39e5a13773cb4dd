"""The clocks that do not slow an answer: a streamer for tokens, events for the vision tower, a proxy for images."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.cache_probe import vision_tower
from grpo_toolkit.model.hardware.synchronize import synchronize
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.memory import reset_resident_peak

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class TokenClock:
    """A `generate` streamer that notes when each step's tokens reached the host; peaks of memory since its start."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.times_s: list[float] = []
        self.first_token = float("inf")  # perf_counter's, for the vision tower's timer
        self._saw_prompt = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reset_resident_peak()
        synchronize(device)
        self._start = time.perf_counter()

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start

    def put(self, value: torch.Tensor) -> None:
        """Note a step: `generate` hands over the prompt first, then each step's tokens."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        moment = time.perf_counter()
        self.times_s.append(moment - self._start)
        self.first_token = min(self.first_token, moment)

    def end(self) -> None:
        """Do nothing: the last token has been noted."""

    def peaks(self) -> tuple[int | None, int | None]:
        """Return the GPU's peaks of allocated and reserved bytes; None on a CPU."""
        import torch

        if self.device.type != "cuda":
            return None, None
        return int(torch.cuda.max_memory_allocated(self.device)), int(torch.cuda.max_memory_reserved(self.device))


class VisionTimer:
    """A timer of the vision tower: on a GPU with events on its stream, which make nobody wait."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._tower = vision_tower(base_model(model))
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[float, Any]] = []
        self._hooks = LookingHooks("timing the vision tower")

    def __enter__(self) -> VisionTimer:
        if self._tower is not None:
            self._hooks.before(self._tower, self._mark)
            self._hooks.after(self._tower, self._mark)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _mark(self, *_: object) -> None:
        event: Any = None
        if self._on_gpu:
            import torch

            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        self._marks.append((time.perf_counter(), event))

    def seconds(self, *, first_token: float) -> tuple[float, float]:
        """Return the tower's seconds before the first token, and after it; zeros where timing it failed."""
        before = after = 0.0
        if self._hooks.failed:  # perhaps between a begin and its end
            return before, after
        for (begin, first), (end, last) in zip(self._marks[::2], self._marks[1::2], strict=True):
            spent = first.elapsed_time(last) / 1e3 if self._on_gpu else end - begin
            if begin < first_token:
                before += spent
            else:
                after += spent
        return before, after


class _TimedCall:
    def __init__(self, target: Any, spent: list[float]) -> None:
        self._target, self._spent = target, spent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self._target(*args, **kwargs)
        self._spent.append(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


@contextmanager
def timed_images(processor: Any) -> Iterator[list[float]]:
    """Time the image processor inside a processor's call; a tokenizer has none, and the list stays empty."""
    spent: list[float] = []
    inside = getattr(processor, "image_processor", None)
    if inside is None:
        yield spent
        return
    processor.image_processor = _TimedCall(inside, spent)
    try:
        yield spent
    finally:
        processor.image_processor = inside
