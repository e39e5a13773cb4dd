"""Facts about a folder's tensors and its base's that several rules need."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.tensor_names import find_suffix, is_lora, plan_renames

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def weights(folder: Folder) -> Mapping[str, TensorInfo]:
    """Return the tensors of a full model; none for every other kind of folder."""
    return folder.tensors if folder.kind is Kind.MODEL else {}


def base_tensors(folder: Folder) -> Mapping[str, TensorInfo]:
    """Return the tensors of the base, where it is a full model."""
    base = folder.base
    return base.tensors if base is not None and base.kind is Kind.MODEL else {}


@lru_cache(maxsize=4)  # several rules ask the same of one folder
def new_names(folder: Folder) -> dict[str, str]:
    """Return new names for the tensors whose names are not the published ones."""
    known = frozenset(base_tensors(folder)) or None
    return plan_renames(weights(folder), known, folder.model_type)


@lru_cache(maxsize=4)
def settled(folder: Folder) -> dict[str, TensorInfo]:
    """Return our tensors under the names that they should have, for comparison with the base."""
    renames = new_names(folder)
    return {renames.get(name, name): info for name, info in weights(folder).items()}


@lru_cache(maxsize=4)
def has_lora(folder: Folder) -> bool:
    """Return whether factors of an adapter are among the weights."""
    return any(is_lora(name) for name in folder.tensors)


def tie_flags(folder: Folder) -> dict[tuple[str, ...], Any]:
    """Return `tie_word_embeddings` of each level of the config that has it."""
    places = ((), ("text_config",))
    values = {place: folder.get(CONFIG, *place, "tie_word_embeddings") for place in places}
    return {place: value for place, value in values.items() if value is not ABSENT}


@lru_cache(maxsize=4)
def ends(folder: Folder) -> tuple[str | None, str | None]:
    """Return the stored names of the output head and of the embedding."""
    ours = weights(folder)
    return find_suffix(ours, HEAD), find_suffix(ours, EMBEDDING)


def lone_head(folder: Folder) -> str | None:
    """Return the head's name where a tied model's one matrix was stored under it rather than under the embedding's."""
    head, embedding = ends(folder)
    return head if embedding is None else None
