"""Buffers that a model computes when it is built, above all the frequencies of its rotary positions.

They are in no file, so an export cannot carry them: who loads it computes them anew, in float32. A training that
rounded them has taught its policy other positions than the export will have; in bfloat16 a frequency is off by up to
0.4%, four whole positions at position 1,000. It happens where

- DeepSpeed shares the model out as it loads (ZeRO-3 with `zero3_init_flag: true`): `zero.Init` casts every float
  tensor that is made meanwhile. Seen with transformers 5.17 to 5.22 (language model and vision tower) and 4.57 (vision
  tower), DeepSpeed 0.19; 5.23 computes them again afterwards.
- somebody casts the whole model (`model.to(torch.bfloat16)`, `model.half()`).
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

from grpo_toolkit.cache import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def rounded_buffers(model: torch.nn.Module) -> list[str]:
    """Names of the computed floating-point buffers that are not in float32 or better."""
    return sorted(name for name, buffer in _computed(base_model(model)).items() if _is_rounded(buffer))


def restore_buffers(model: torch.nn.Module) -> list[str]:
    """Compute those buffers again, in the precision that the model's class gives them.

    Returns:
        Names of the buffers that were put right. What the class itself makes in half precision stays.
    """
    inner = base_model(model)
    rounded = rounded_buffers(model)
    if not rounded:
        return []
    found = []
    computed = _computed(_skeleton(inner))
    for name in rounded:
        right = computed.get(name)
        if right is None or _is_rounded(right) or right.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        live = inner.get_buffer(name)
        if right.shape == live.shape:
            inner.get_submodule(owner).register_buffer(leaf, right.to(live.device), persistent=False)
            found.append(name)
    return found


@contextmanager
def _not_shared_out() -> Iterator[None]:
    """Models built here are whole: under ZeRO-3 transformers shares out every one that it builds."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def _computed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that no checkpoint has."""
    return {
        f"{path}.{name}" if path else name: module.get_buffer(name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }


def _is_rounded(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() and buffer.element_size() < 4


def _skeleton(model: torch.nn.Module) -> torch.nn.Module:
    """The same architecture with buffers and without weights, built as a load in the model's dtype builds it."""
    import torch

    from accelerate import init_empty_weights

    usual = torch.get_default_dtype()
    torch.set_default_dtype(base_model(model).dtype)
    try:
        with _not_shared_out(), init_empty_weights(include_buffers=False):
            return type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(usual)
