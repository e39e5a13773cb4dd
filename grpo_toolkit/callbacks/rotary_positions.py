"""The rotary positions that a saved model will have once it is loaded, set before the first step."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rotary_buffers import restore_buffers, right_buffers

if TYPE_CHECKING:
    import torch
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_looked_at: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[TrainerState]] = weakref.WeakKeyDictionary()
"""For which training each model was last looked at; a training has a state of its own."""


def restore_positions(model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Compute the buffers that loading has rounded again, once a training, and log their names.

    Several callbacks call this; only the first call of a training does something. A model class that cannot be built
    from its config alone may raise any error.
    """
    last = _looked_at.get(base_model(model))
    if last is not None and last() is state:
        return
    _looked_at[base_model(model)] = weakref.ref(state)
    if getattr(args, "use_transformers_continuous_batching", False) and args.bf16 and state.is_world_process_zero:
        logger.warning(
            "grpo_toolkit: rollouts by continuous batching cast the whole model to bfloat16 at every step, its "
            "rotary positions too (TRL 1.16); a model loaded from the saved files will not have that rounding, and an "
            "export may be refused for it. Roll out without: use_transformers_continuous_batching=False"
        )
    # A reference model of its own was rounded as well, and is not to be had here: the two would drift apart.
    has_reference = bool(getattr(args, "beta", 0.0)) and not hasattr(model, "peft_config")
    names = list(right_buffers(model)) if has_reference else restore_buffers(model)
    if not names or not state.is_world_process_zero:
        return
    consequence = "they are computed anew, as they are for who loads the saved model"
    if has_reference:
        consequence = (
            "a model loaded from the saved files will not have that rounding, and policy and reference model have it "
            "both. Load them without it: zero3_init_flag: false"
        )
    logger.warning(
        "grpo_toolkit: %d buffers that no file holds (%s, ...) had been rounded to half precision while the model "
        "was loaded; %s",
        len(names),
        names[0],
        consequence,
    )
