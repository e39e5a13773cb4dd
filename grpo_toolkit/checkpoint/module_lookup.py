"""The stored tensors of a module that an adapter names: the same lookup for a merge and for the doctor.

Names are the live model's, as `tensor_names.live_name` gives them. Standard library only.
"""

from __future__ import annotations

from itertools import count, takewhile
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.model_families import EXPERT_PARTS

if TYPE_CHECKING:
    from collections.abc import Container


def expert_names(parameter: str, stored: Container[str]) -> list[tuple[str, ...]]:
    """Return the names that a stacked parameter is stored under, for each expert its parts; none where it is not.

    Args:
        parameter: the live model's name, such as `model.layers.0.mlp.experts.gate_up_proj`.
        stored: the live names of what is stored.
    """
    module, _, leaf = parameter.rpartition(".")
    for parts in EXPERT_PARTS.get(leaf, ()):
        by_expert = (tuple(f"{module}.{expert}.{part}.weight" for part in parts) for expert in count())
        found = list(takewhile(lambda names: all(name in stored for name in names), by_expert))
        if found:
            return found
    return []


def is_stored(module: str, stored: Container[str]) -> bool:
    """Return whether a module's weight is stored, or, where it is a stack of experts, its parameters are."""
    leaves = ("weight", *EXPERT_PARTS)
    return any(f"{module}.{leaf}" in stored or expert_names(f"{module}.{leaf}", stored) for leaf in leaves)
