"""The comparison of weights by their bytes, on request: only this part of a diagnosis reads weights.

Standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.tensor_names import find_suffix, live_name, plan_renames
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors, read_chunks
from grpo_toolkit.doctor.parsed_folder import Digests

if TYPE_CHECKING:
    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder


def compare_heads(folder: Folder) -> Digests:
    """Compare only the stored head with the embedding."""
    tensors = folder.tensors
    head, embedding = find_suffix(tensors, "lm_head.weight"), find_suffix(tensors, "embed_tokens.weight")
    if head is None or embedding is None:
        return Digests()
    return Digests(heads_differ=not _equal(folder, tensors[head], folder, tensors[embedding]))


def compare_weights(folder: Folder) -> Digests:
    """Read the weights of a folder, and of its base as far as they are alike."""
    compared, is_the_base = _compare_with_base(folder)
    second = [info for name, info in folder.tensors.items() if ".lora_B" in name]
    return Digests(
        heads_differ=compare_heads(folder).heads_differ,
        compared=compared,
        is_the_base=is_the_base,
        is_zero=bool(second)
        and all(not any(map(any, read_chunks(folder.path, info, inside=True))) for info in second),
    )


def _compare_with_base(folder: Folder) -> tuple[int, bool]:
    base = folder.base
    if base is None:
        return 0, False
    family = family_of(folder.model_type)
    renames = plan_renames(folder.tensors, frozenset(base.tensors), folder.model_type)
    published = {live_name(name, family): info for name, info in base.tensors.items()}
    compared = 0
    for name, info in folder.tensors.items():
        other = published.get(live_name(renames.get(name, name), family))
        if other is not None:
            if not _equal(folder, info, base, other):
                return compared, False
            compared += 1
    return compared, compared > 0


def _equal(ours: Folder, one: TensorInfo, theirs: Folder, other: TensorInfo) -> bool:
    return equal_tensors(ours.path, one, theirs.path, other, inside=True)
