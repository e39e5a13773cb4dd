"""A base folder's headers: its stored tensors, and where the live model's names are stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Checkpoint, Kind
from grpo_toolkit.checkpoint.json_files import JsonObject, read_json
from grpo_toolkit.checkpoint.model_families import Family, family_of
from grpo_toolkit.checkpoint.tensor_names import (
    INPUT_EMBEDDINGS,
    OUTPUT_EMBEDDINGS,
    is_embedding,
    names_by_live,
)
from grpo_toolkit.checkpoint.tied_embeddings import tie_flags
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors
from grpo_toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base folder's stored tensors, and their names by those of the live model."""

    path: Path
    config: JsonObject
    family: Family
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]

    @cached_property
    def is_tied(self) -> bool:
        """Return whether the output embeddings are the input embeddings: none are stored, or the same bytes again.

        Loading unties two that differ, whatever the config says (transformers 5).
        """
        heads, inputs = (self._embeddings(ends) for ends in (OUTPUT_EMBEDDINGS, INPUT_EMBEDDINGS))
        flags = tie_flags(self.config)
        if not heads:
            return any(flags.values()) or not flags
        if not next(iter(flags.values()), self.family.is_tied):
            return False
        return len(inputs) == 1 and all(equal_tensors(self.path, inputs[0], self.path, head) for head in heads)

    def _embeddings(self, ends: frozenset[str]) -> list[TensorInfo]:
        return [self.tensors[name] for live, name in self.stored.items() if is_embedding(live, ends)]

    @property
    def vocabulary(self) -> int | None:
        """The rows of the input embeddings, or None where no tensor is known to be them."""
        stored = [name for live, name in self.stored.items() if is_embedding(live, INPUT_EMBEDDINGS)]
        return self.tensors[stored[0]].shape[0] if len(stored) == 1 else None


def open_base(checkpoint: Checkpoint) -> Base:
    """Read a base folder's headers; `tensors` is empty where nothing is stored as safetensors.

    Raises:
        CheckpointError: damaged.
        UnsupportedError: an adapter itself.
    """
    path = checkpoint.path
    if checkpoint.kind is Kind.ADAPTER:
        raise UnsupportedError(f"{path}: is an adapter itself; merge it into its base first, then merge into that")
    config = read_json(path / CONFIG)
    tensors = checkpoint.tensors()
    family = family_of(config.get("model_type"))
    return Base(path=path, config=config, family=family, tensors=tensors, stored=names_by_live(tensors, family))
