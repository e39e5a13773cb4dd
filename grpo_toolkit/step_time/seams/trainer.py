"""The seams on a trainer and on its image processor, by their public names alone.

A callback is handed no trainer. With one, what only it has is timed too: reading rows, reward functions, a reference
model, the border of the backward pass, vLLM. Each is an instance attribute with the same call in it, put back at the
end.
"""

from __future__ import annotations

import functools
import inspect
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from grpo_toolkit.step_time.clock import OTHER, PREPARING
from grpo_toolkit.step_time.seams.other_models import OtherModels

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_toolkit.step_time.seams.model import ModelSeams


class TrainerSeams:
    """Instance attributes of a trainer that tell a clock what it is doing, from their making to `close`.

    Args:
        trainer: any `transformers.Trainer`; None: only the image processor is looked at.
        seams: those of its model, whose clock is told and whose notes are written.
        processing_class: the tokenizer or processor.
        on_reading: called when rows begin to be read.

    Attributes:
        sees_reading, sees_backward: whether the trainer shows where these begin and end.
    """

    def __init__(
        self, trainer: Any, seams: ModelSeams, processing_class: Any, *, on_reading: Callable[[], None]
    ) -> None:
        self.seams = seams
        self.sees_reading = self.sees_backward = False
        self._on_reading = on_reading
        self._others = OtherModels(seams)
        self._undo = ExitStack()
        self._look_at_images(getattr(processing_class, "image_processor", None))
        self._look_at_texts(processing_class)
        if trainer is not None:
            self._look_at(trainer)

    def close(self) -> None:
        """Put everything back."""
        self._undo.close()

    def _look_at(self, trainer: Any) -> None:
        if hasattr(trainer, "get_batch_samples"):
            self._replace(trainer, "get_batch_samples", self._reading(trainer.get_batch_samples))
            self.sees_reading = True
        if hasattr(trainer, "training_step"):
            self._replace(trainer, "training_step", self._preparing(trainer.training_step))
        accelerator = getattr(trainer, "accelerator", None)
        if accelerator is not None and hasattr(accelerator, "backward"):
            self._replace(accelerator, "backward", self._backward(accelerator.backward))
            self.sees_backward = True
        if getattr(accelerator, "num_processes", 1) > 1:
            self._time(accelerator, "gather", "waiting_for_ranks")
            self._time(accelerator, "wait_for_everyone", "waiting_for_ranks")
        self._time(getattr(trainer, "vllm_generation", None), "sync_weights", "weight_sync")
        self._time(getattr(trainer, "vllm_generation", None), "generate", "rollout", "vllm")
        self._time(trainer, "rollout_func", "rollout", "rollout_func")
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            self._others.add_reference(reference)
        self._look_at_rewards(getattr(trainer, "reward_funcs", None))

    def _look_at_rewards(self, functions: Any) -> None:
        from torch.nn import Module

        if not isinstance(functions, list):
            return
        for index, function in enumerate(functions):
            if isinstance(function, Module):
                self._others.add_reward(function, _name(function))
            elif callable(function) and not _is_async(function):
                functions[index] = self._rewarding(function, _name(function))
                self._undo.callback(functools.partial(_put_back_item, functions, index, functions[index], function))

    def _time(self, owner: Any, name: str, *path: str) -> None:
        """Time an attribute of the owner's that can be called, if it has one."""
        call = getattr(owner, name, None)
        if callable(call):
            self._replace(owner, name, self._timed(call, *path))

    def _replace(self, owner: Any, name: str, ours: Any) -> None:
        had = name in vars(owner)
        before = vars(owner).get(name)
        setattr(owner, name, ours)

        def put_back() -> None:
            if vars(owner).get(name) is not ours:
                return  # somebody has put something around it since
            if had:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        self._undo.callback(put_back)

    def _timed(self, call: Any, *path: str) -> Any:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.seams.phase(*path):
                return call(*args, **kwargs)

        return timed

    def _reading(self, call: Any) -> Any:
        @functools.wraps(call)
        def reading(*args: Any, **kwargs: Any) -> Any:
            self.seams.guarded(self._on_reading)
            return call(*args, **kwargs)

        return reading

    def _preparing(self, call: Any) -> Any:
        """Name what comes before the micro-batch's forward: the trainer's own work on its rows."""

        @functools.wraps(call)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.seams.guarded(self.seams.switch, PREPARING)
            try:
                return call(*args, **kwargs)
            finally:
                if self.seams.clock.path == (PREPARING,):
                    self.seams.guarded(self.seams.switch, OTHER)

        return step

    def _backward(self, call: Any) -> Any:
        @functools.wraps(call)
        def backward(*args: Any, **kwargs: Any) -> Any:
            self.seams.guarded(self.seams.switch, "backward")
            try:
                return call(*args, **kwargs)
            finally:
                self.seams.guarded(self.seams.switch, OTHER)

        return backward

    def _rewarding(self, function: Any, name: str) -> Any:
        @functools.wraps(function)
        def rewarding(*args: Any, **kwargs: Any) -> Any:
            began, cpu = time.perf_counter(), time.process_time()
            with self.seams.phase("rewards", name):
                found = function(*args, **kwargs)
            notes = self.seams.notes
            if notes is not None:
                wall, busy = notes.rewards_cpu.get(name, (0.0, 0.0))
                spent = time.perf_counter() - began, time.process_time() - cpu
                notes.rewards_cpu[name] = (wall + spent[0], busy + spent[1])
            return found

        return rewarding

    def _look_at_images(self, image_processor: Any) -> None:
        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.seams.notes is not None:
                self.seams.guarded(self.seams.notes.add_images, args[0] if args else kwargs.get("images"))

        self._time_on_class(image_processor, "preprocess", "image_processing", note=note)

    def _look_at_texts(self, processing_class: Any) -> None:
        for name in ("__call__", "apply_chat_template"):
            self._time_on_class(processing_class, name, "texts", "tokenising")
        self._time_on_class(processing_class, "batch_decode", "texts", "decoding")

    def _time_on_class(self, owner: Any, name: str, *path: str, note: Any = None) -> None:
        """Time a method of one object on its class: an attribute of the object would be saved with its settings."""
        kind: Any = type(owner)
        if not any(name in vars(base) for base in kind.__mro__):  # every class can be called itself
            return
        had, before = name in vars(kind), getattr(kind, name)
        seams = self.seams

        @functools.wraps(before)
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not owner:
                return before(self, *args, **kwargs)
            with seams.phase(*path):
                if note is not None:
                    note(args, kwargs)
                return before(self, *args, **kwargs)

        setattr(kind, name, timed)

        def put_back() -> None:
            if vars(kind).get(name) is not timed:
                return
            if had:
                setattr(kind, name, before)
            else:
                delattr(kind, name)

        self._undo.callback(put_back)


def _put_back_item(functions: list[Any], index: int, ours: Any, before: Any) -> None:
    if index < len(functions) and functions[index] is ours:
        functions[index] = before


def _is_async(function: Any) -> bool:
    """Return whether the trainer runs it in a loop of another thread, where several overlap."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _name(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    name = getattr(inner, "__name__", None) or getattr(getattr(inner, "config", None), "_name_or_path", "")
    return (name or type(inner).__name__).rstrip("/").rpartition("/")[2].replace(".", "_")
