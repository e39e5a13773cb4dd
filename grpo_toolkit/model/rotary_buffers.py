"""Buffers that a model computes when it is built, above all the frequencies of its rotary positions.

They are in no file, so an export cannot carry them: who loads it computes them anew, in float32. A training that
rounded them has taught its model other positions than the export will have; in bfloat16 a frequency is off by up to
0.4%, four whole positions at position 1,000. It happens where

- DeepSpeed shares the model out as it loads (ZeRO-3 with `zero3_init_flag: true`): `zero.Init` casts every float
  tensor that is made meanwhile. Seen with transformers 5.17 to 5.22 (language model and vision tower) and 4.57 (vision
  tower), DeepSpeed 0.19; 5.23 computes them again afterwards.
- somebody casts the whole model (`model.to(torch.bfloat16)`, `model.half()`).
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import TYPE_CHECKING

from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.sharding.gather import unsharded_models

if TYPE_CHECKING:
    import torch
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def rounded_buffers(model: torch.nn.Module) -> list[str]:
    """Return the names of the computed floating-point buffers that are in half precision."""
    import torch

    halves = (torch.bfloat16, torch.float16)
    return sorted(name for name, buffer in _computed(base_model(model)).items() if buffer.dtype in halves)


def right_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return those of them that the model's class makes in float32, as it makes them.

    What the class itself makes in half precision is none of them: a load for an export makes it so, too.
    """
    import torch

    inner = base_model(model)
    live = {name: inner.get_buffer(name) for name in rounded_buffers(model)}
    live = {name: buffer for name, buffer in live.items() if not buffer.is_meta}
    if not live:
        return {}
    # In the buffers' dtype, not in the model's: training in half precision may keep its weights in float32.
    computed = _computed(_skeleton(inner, next(iter(live.values())).dtype))
    return {
        name: right
        for name, buffer in live.items()
        if (right := computed.get(name)) is not None
        and right.dtype == torch.float32
        and right.shape == buffer.shape
        and not right.is_meta
    }


def restore_buffers(model: torch.nn.Module) -> list[str]:
    """Compute those buffers again, in the precision that the model's class gives them.

    Returns:
        Names of the buffers that were put right. What the class itself makes in half precision stays.
    """
    inner = base_model(model)
    right = right_buffers(model)
    for name, buffer in right.items():
        owner, _, leaf = name.rpartition(".")
        device = inner.get_buffer(name).device
        module = inner.get_submodule(owner)
        module.register_buffer(leaf, buffer.to(device), persistent=False)
        # Dynamic RoPE: how long a text these are for (transformers.modeling_rope_utils).
        if hasattr(module, "original_max_seq_len"):
            for attribute in [known for known in vars(module) if known.endswith("max_seq_len_cached")]:
                setattr(module, attribute, module.original_max_seq_len)
    return list(right)


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


def _computed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that no checkpoint has."""
    return {
        f"{path}.{name}" if path else name: module.get_buffer(name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }


def _skeleton(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Build the same architecture with buffers and without weights, as a load in that dtype does."""
    import torch
    from accelerate import init_empty_weights

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Some classes draw weights as they are built (CLIP's), from the numbers that the training would draw next.
        with torch.random.fork_rng(devices=[]), unsharded_models(), init_empty_weights(include_buffers=False):
            return type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(usual)
