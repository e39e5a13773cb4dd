"""No gradient for a frozen vision tower.

`enable_input_require_grads`, which LoRA with gradient checkpointing calls, marks the output of *every* input
embedding in the model as one that wants a gradient, the tower's `patch_embed` too. A tower without a trainable
parameter is then recomputed and backpropagated for a gradient that nobody reads. Only reentrant checkpointing needs
such a mark, and only where something behind it trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.hooks import LookingHooks

if TYPE_CHECKING:
    import torch

MARKS: Final = ("make_inputs_require_grads", "make_inputs_require_grad")
"""The hooks by their functions' names: transformers' and PEFT's."""


class FrozenTower:
    """A guard that keeps these hooks off a tower while none of its parameters trains; closing it puts them back.

    The tower is looked at again before each of its forwards: TRL switches checkpointing off and on around rollouts,
    and a model with an adapter of transformers' own then marks its embeddings anew.
    """

    def __init__(self, tower: torch.nn.Module) -> None:
        self.tower = tower
        self.removed: list[tuple[torch.nn.Module, int, Any]] = []
        self._hooks = LookingHooks("keeping gradients off a frozen vision tower")
        self._hooks.before(tower, self._before)
        self.release()

    def release(self) -> None:
        """Take the hooks off, if nothing in the tower trains."""
        if any(parameter.requires_grad for parameter in self.tower.parameters()):
            return
        for module in self.tower.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", None) in MARKS:
                    del module._forward_hooks[key]
                    self.removed.append((module, key, hook))

    def close(self) -> None:
        """Put the hooks back under their own keys, so that `disable_input_require_grads` finds them."""
        self._hooks.close()
        for module, key, hook in self.removed:
            module._forward_hooks.setdefault(key, hook)
        self.removed.clear()

    def _before(self, *_: object) -> None:
        self.release()
