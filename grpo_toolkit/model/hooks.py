"""Hooks on a live model's forward that only look, so that none of them can harm it.

An exception in a forward hook is an exception of the forward. A rollout then fails for a reason that is ours, and a
trainer may go on without it: TRL trained on completions of one token when a hook asked continuous batching's cache for
a length that it does not have. So every hook of ours on a forward is registered here.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)


class LookingHooks:
    """A set of forward hooks that cannot change or break the forward that they look at.

    What a hook returns is dropped. At the first exception all hooks of the group are taken off for good, and a warning
    says which one failed. A forward may run in another thread than the one that registered them, as it does with
    continuous batching.

        hooks = LookingHooks("counting the forwards")
        hooks.before(model, self._count)
        ...
        hooks.close()

    Args:
        purpose: a name for the group in the warning: "watching the rollouts".
        put_back: undoes whatever the hooks have switched; called whenever they are taken off.

    Attributes:
        failed: whether a hook has raised.
    """

    # No lock and no closures: a model in training is copied and pickled by others, with its hooks.
    def __init__(self, purpose: str, *, put_back: Callable[[], None] | None = None) -> None:
        self.purpose = purpose
        self.failed = False
        self._put_back = put_back
        self._handles: list[RemovableHandle] = []

    def before(self, module: torch.nn.Module, look: Callable[..., object]) -> None:
        """Call `look(module, args, kwargs)` before each forward of a module."""
        self._handles.append(module.register_forward_pre_hook(partial(self.guarded, look), with_kwargs=True))

    def after(self, module: torch.nn.Module, look: Callable[..., object], *, always: bool = False) -> None:
        """Call `look(module, args, output)` after each forward of a module; `always`: also after one that failed."""
        self._handles.append(module.register_forward_hook(partial(self.guarded, look), always_call=always))

    def on_gradient(self, tensor: torch.Tensor, look: Callable[..., object]) -> None:
        """Call `look(gradient)` when the backward pass has come to a tensor that wants a gradient."""
        tensor.register_hook(partial(self.guarded, look))  # type: ignore[no-untyped-call]  # goes with the graph

    def close(self) -> None:
        """Take the hooks off, and put back what they have switched."""
        while self._handles:
            self._handles.pop().remove()
        if self._put_back is not None:
            self._put_back()

    def guarded(self, look: Callable[..., object], *given: Any) -> None:
        """Call `look(*given)`; at its first exception all hooks of the group are taken off."""
        if self.failed:  # another thread's forward had it in its list already
            return
        try:
            look(*given)
        except Exception as error:  # whatever it is, it is no matter of the forward
            self._let_go(error)

    def _let_go(self, error: Exception) -> None:
        self.failed = True
        with suppress(Exception):  # of putting back
            self.close()
        logger.warning(
            "grpo_toolkit: %s failed and is off from here on, the model's forward goes on without it (%s: %s)",
            self.purpose,
            type(error).__name__,
            error,
        )
