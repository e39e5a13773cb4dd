"""The seams on models beside the one that trains: a reference, and rewards that are models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from grpo_toolkit.step_time.seams.forward_shapes import token_shape
from grpo_toolkit.step_time.seams.notes import ForwardNotes

if TYPE_CHECKING:
    import torch

    from grpo_toolkit.step_time.seams.model import ModelSeams


class OtherModels:
    """Hooks on other models that tell the clock of a model's seams what they do.

    Args:
        seams: of the model that trains; the hooks are among its own, and go with them.
    """

    def __init__(self, seams: ModelSeams) -> None:
        self.seams = seams

    def add_reference(self, model: torch.nn.Module) -> None:
        """Look at a reference model of its own, too."""
        self.seams.hooks.before(model, self._before_reference)
        self.seams.hooks.after(model, partial(self._after, "reference_logprobs"), always=True)

    def add_reward(self, model: torch.nn.Module, name: str) -> None:
        """Look at a reward that is a model, too."""
        self.seams.hooks.before(model, partial(self._before_reward, name))
        self.seams.hooks.after(model, partial(self._after, "rewards"), always=True)

    def _before_reference(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.seams.is_ours() or self.seams.notes is None:
            return
        self.seams.clock.enter("reference_logprobs")
        shape = token_shape(args, kwargs)
        if shape is not None:
            notes = ForwardNotes(rows=shape[0], length=shape[1], phase="reference_logprobs")
            self.seams.notes.forwards.append(notes)

    def _before_reward(self, name: str, *_: object) -> None:
        if self.seams.is_ours():
            self.seams.clock.enter("rewards", name)

    def _after(self, phase: str, *_: object) -> None:
        if self.seams.is_ours() and self.seams.clock.path[0] == phase:
            self.seams.clock.leave()
