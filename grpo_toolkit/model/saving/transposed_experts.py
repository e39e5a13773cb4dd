"""Stacked experts that a family is published with the other way round than the live model holds them.

Qwen3-VL-MoE is. transformers 5 transposes what does not fit as it loads; undone for a save, that is a transposition of
what does not fit the model itself, which is nothing (`Transpose(check_dims=True)` in its `core_model_loading.py`). A
save has other shapes than its base then, which transformers 4 refuses.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.model.sharding.gather import whole_shape

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def turned_back(conversions: list[Any], model: PreTrainedModel, base: Path | None) -> list[Any]:
    """Return a model's conversions of loading, of which undoing turns round again what loading has turned round.

    Args:
        conversions: `_weight_conversions` of a loaded model; stays as it is.
        model: the model.
        base: the folder that it was loaded from, or None.
    """
    if base is None or not any(_is_asking(op) for one in conversions for op in getattr(one, "operations", ())):
        return conversions
    if not _is_stored_turned(model, base):
        return conversions
    turned = []
    for conversion in conversions:
        changed = copy.copy(conversion)
        if hasattr(changed, "operations"):
            operations = [type(op)(op.dim0, op.dim1) if _is_asking(op) else op for op in conversion.operations]
            changed.operations = operations
        turned.append(changed)
    return turned


def _is_asking(operation: Any) -> bool:
    return bool(getattr(operation, "check_dims", False))


def _is_stored_turned(model: PreTrainedModel, folder: Path) -> bool:
    base = open_base(open_checkpoint(folder))
    shapes = {name: tuple(whole_shape(parameter)) for name, parameter in model.named_parameters()}
    stored = [(base.tensors[name].shape, shapes[live]) for live, name in base.stored.items() if live in shapes]
    return any(len(ours) == 3 and theirs == (ours[0], ours[2], ours[1]) != ours for theirs, ours in stored)
