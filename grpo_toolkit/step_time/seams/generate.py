"""The seam in front of a live model's `generate` and `generate_batch`: instance methods, which trainers' calls end at.

What was there before, such as the method of our compiled rollouts, is called from inside.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from grpo_toolkit.model.rollouts.rollouts import rollouts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Rollout = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]

_installed: WeakKeyDictionary[torch.nn.Module, weakref.ref[GenerateSeam]] = WeakKeyDictionary()
"""Held by whoever made them: a training that crashed leaves nothing behind that is called."""


class GenerateSeam:
    """Instance methods of a model that hand each of its rollouts to a function, from their making to `close`.

    Args:
        live: the transformers model inside all wrappers.
        rollout: called with the method's name and its arguments; makes the rollout by `inner(name)`.
    """

    def __init__(self, live: Any, rollout: Rollout) -> None:
        self.live = live
        self.rollout = rollout
        self._before_us = {name: vars(live)[name] for name in _OURS if name in vars(live)}
        self._was_fast = rollouts_of(live) is not None
        _installed[live] = weakref.ref(self)
        for name, ours in _OURS.items():
            if hasattr(type(live), name):
                # Bound, so that a deep copy of the model has a method of its own.
                setattr(live, name, MethodType(ours, live))

    def inner(self, name: str) -> Any:
        """Return the method that ours stands in front of."""
        return self._before_us.get(name) or getattr(type(self.live), name).__get__(self.live)

    def close(self) -> None:
        """Give the methods back."""
        if _seam_of(self.live) is self:
            del _installed[self.live]
        for name, ours in _OURS.items():
            if getattr(vars(self.live).get(name), "__func__", None) is not ours:
                continue  # somebody has put something around it since, and finds nobody
            # Our compiled rollouts, let go of meanwhile, would have taken theirs off had ours not stood before it.
            is_over = name == "generate" and self._was_fast and rollouts_of(self.live) is None
            if name in self._before_us and not is_over:
                setattr(self.live, name, self._before_us[name])
            else:
                delattr(self.live, name)


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what `generate` is given, by name."""
    names = ("input_ids", "generation_config")
    return {name: value for name, value in zip(names, args, strict=False) if value is not None} | kwargs


def _seam_of(model: torch.nn.Module) -> GenerateSeam | None:
    found = _installed.get(model)
    return None if found is None else found()


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a live model's `generate`."""
    return _through(model, "generate", args, kwargs)


def _generate_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a live model's `generate_batch`, which decodes in a thread of its own."""
    return _through(model, "generate_batch", args, kwargs)


def _through(model: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    seam = _seam_of(model)
    if seam is None:  # a copy of the model
        return getattr(type(model), name)(model, *args, **kwargs)
    return seam.rollout(name, args, kwargs)


_OURS: Final = {"generate": _generate, "generate_batch": _generate_batch}
