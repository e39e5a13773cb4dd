"""Rollouts of a vision-language model whose weights FSDP2 has spread over processes.

transformers 5 lets `generate` look at the images before it calls the model's own forward. FSDP2 brings the weights
that belong to no layer (the patch embedding, the merger) together in that forward, so the vision tower meets shards:
`aten.convolution.default: got mixed torch.Tensor and DTensor`. Here they are brought together for each `generate`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class ShardedRolloutsCallback(TrainerCallback):
    """A callback that makes `model.generate` work where FSDP2 has sharded the model; elsewhere it does nothing."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        generate_whole(model)


def generate_whole(model: Any) -> None:
    """Let `model.generate` gather what belongs to no layer, and give it back afterwards, if FSDP2 has it sharded."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule) or hasattr(model.generate, "gathers"):
        return
    generate = model.generate

    @functools.wraps(generate)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        # The first forward would do this; a layer that is called before it would take itself for the root.
        model._get_fsdp_state()._lazy_init()
        model.unshard()
        try:
            return generate(*args, **kwargs)
        finally:
            model.reshard()

    gathered.gathers = True  # type: ignore[attr-defined]  # which fast rollouts look for: they gather by themselves
    model.generate = gathered
