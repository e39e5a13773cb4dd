"""Facts about a folder's tensors and its base's that several rules need."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.safetensors_header import transposed_shape
from grpo_toolkit.checkpoint.tensor_names import (
    INPUT_EMBEDDINGS,
    find_suffix,
    is_embedding,
    is_lora,
    is_vision,
    live_name,
    plan_renames,
    published_name,
    stored_layers,
)
from grpo_toolkit.checkpoint.tied_embeddings import tie_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder

# Heads that predict several tokens ahead, and what once was a parameter or a stored buffer: loaders pass over them and
# saving leaves them out. Such a head may also be one layer more than the config counts.
# Source: `_keys_to_ignore_on_load_unexpected` of the classes in transformers 5.24, and `PreTrainedModel.
# _adjust_missing_and_unexpected_keys`.
_PASSED_OVER: Final = re.compile(
    r"(?:^|\.)mtp[._]|rotary_emb\.inv_freq$|(?:^|\.)position_ids$|\.attn\.(?:bias|masked_bias|causal_mask)$"
)

PREFIX: Final = "model."
"""The `base_model_prefix` of most models: transformers 5 takes one away or puts one before a name, where that fits."""
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
    ours = weights(folder)
    renames = plan_renames(ours, known, folder.model_type)
    if known is not None:  # the model's prefix, put before the head as well, or left out
        strange = [name for name in ours if name not in known and name not in renames]
        either = ((name, new) for name in strange for new in (name.removeprefix(PREFIX), PREFIX + name))
        renames |= {
            name: new
            for name, new in either
            if new in known and new not in ours and published_name(new, folder.model_type) != name
        }
    return renames


@lru_cache(maxsize=4)
def by_live_name(folder: Folder) -> dict[str, str]:
    """Return a full model's stored names by the live model's: two folders may spell one model in two ways."""
    family, renames = family_of(folder.model_type), new_names(folder)
    return {live_name(renames.get(name, name), family): name for name in weights(folder)}


def base_by_live_name(folder: Folder) -> dict[str, str]:
    """Return the same of the base, where it is a full model."""
    return {} if folder.base is None else by_live_name(folder.base)


def is_passed_over(folder: Folder, name: str) -> bool:
    """Return whether no class of transformers holds a stored tensor: a model without it is whole all the same."""
    layers, layer = folder.text_value("num_hidden_layers"), stored_layers([name])
    return _PASSED_OVER.search(name) is not None or (type(layers) is int and bool(layer) and min(layer) >= layers)


@lru_cache(maxsize=4)
def has_lora(folder: Folder) -> bool:
    """Return whether factors of an adapter are among the weights."""
    return any(is_lora(name) for name in folder.tensors)


@lru_cache(maxsize=4)
def stacked_experts(folder: Folder) -> tuple[str, ...]:
    """Return the names of experts that are stored as transformers 5 holds them: all of a layer in one tensor."""
    return tuple(sorted(name for name in weights(folder) if _STACKED.search(name)))


# Published with a tensor for each expert, and read so by every release before 5.
_SINGLE_EXPERTS: Final = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3", "minimax"}
)

_STACKED: Final = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)$")


def stacked_though_published_apart(folder: Folder) -> tuple[str, ...]:
    """Return the stacked experts of a folder whose base, or family, has a tensor for each expert."""
    names, base = stacked_experts(folder), base_tensors(folder)
    is_other = not any(name in base for name in names) if base else folder.model_type in _SINGLE_EXPERTS
    return names if is_other else ()


def read_tie_flags(folder: Folder) -> dict[tuple[str, ...], Any]:
    """Return `tie_word_embeddings` of each level of the config that some reader of the folder looks at."""
    config = folder.get(CONFIG)
    flags = tie_flags(config) if isinstance(config, dict) else {}
    return flags if folder.family is not None else dict(list(flags.items())[:1])  # unknown to transformers 4


@lru_cache(maxsize=4)
def ends(folder: Folder) -> tuple[str | None, str | None]:
    """Return the stored names of the output head and of the embedding."""
    ours = weights(folder)
    return find_suffix(ours, HEAD), find_suffix(ours, EMBEDDING)


def text_embedding(folder: Folder) -> str | None:
    """Return the stored name of the language model's embedding, whatever its family calls it."""
    named = [name for name in weights(folder) if is_embedding(name, INPUT_EMBEDDINGS) and not is_vision(name)]
    return min(named, key=len, default=None)


def lone_head(folder: Folder) -> str | None:
    """Return the head's name where a tied model's one matrix was stored under it rather than under the embedding's."""
    head, embedding = ends(folder)
    return head if embedding is None else None


@lru_cache(maxsize=4)
def common_tensors(folder: Folder) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return the tensors that the base has as well, by their names here: the folder's and the base's."""
    published, base = base_by_live_name(folder), base_tensors(folder)
    return {
        name: (folder.tensors[name], base[published[live]])
        for live, name in by_live_name(folder).items()
        if live in published
    }


def is_transposed(ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Return whether a stack of matrices has the base's shape once they are transposed."""
    return len(ours.shape) == 3 and ours.shape != theirs.shape == transposed_shape(ours.shape)
