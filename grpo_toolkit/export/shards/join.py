"""Parts of tensors joined into a model's safetensors; the factors of a LoRA among them are merged on the way."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, Protocol

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, CONFIG, WEIGHTS
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.tensor_names import is_lora, without_wrappers
from grpo_toolkit.checkpoint.tied_embeddings import tie_flags
from grpo_toolkit.checkpoint.weights.shard_writer import Entry, Shard, Span, write_at, write_shards
from grpo_toolkit.checkpoint.weights.tensor_blocks import raw_bytes
from grpo_toolkit.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_FACTOR: Final = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[AB])\.(?:\w+\.)?weight")
_CODES: Final = {name: code for code, name in FLOAT_NAMES.items()} | {"int64": "I64", "int32": "I32", "bool": "BOOL"}
_MOST_SHARED: Final = 4
"""Tied tensors lie in a file once and are said twice; a stride of zero says a terabyte of four bytes."""


class Parts(Protocol):
    """The parts of a model's tensors, however they lie."""

    path: Path
    names: list[str]
    nbytes: int
    """The size of the files in which they lie."""

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return a whole tensor's dtype and shape."""

    def joined(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""


def join(parts: Parts, shards: Path, folder: Path) -> None:
    """Write `model.safetensors` of parts into a folder whose config says the dtype and the tie.

    Raises:
        CheckpointError: the tensors say that they are larger than the files in which they lie.
        UnsupportedError: a LoRA that cannot be merged here, or a dtype that is not written.
    """
    import torch

    forms = [parts.form(name) for name in parts.names]
    claimed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in forms)
    if claimed > _MOST_SHARED * parts.nbytes:
        raise CheckpointError(f"{shards}: tensors of {claimed:,} bytes in files of {parts.nbytes:,}")
    config = read_json(folder / CONFIG)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    dtype = _dtype(config.get("dtype", config.get("torch_dtype")) or text.get("dtype", text.get("torch_dtype")))
    names = {without_wrappers(name): name for name in parts.names if not is_lora(name)}
    factors = _factors(parts, shards)
    scale = _scale(parts, factors, shards) if factors else 0.0
    homeless = sorted(factors.keys() - names.keys())
    if homeless:
        raise UnsupportedError(f"{shards}: the factors of {homeless[0]}, which is not among the tensors")
    head = next((name for name in names if name.endswith(_HEAD)), None)
    embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
    is_tied = next(iter(tie_flags(config).values()), None) is True
    if (
        is_tied
        and head
        and embedding
        and not {head, embedding} & factors.keys()
        and torch.equal(parts.joined(names[head]), parts.joined(names[embedding]))
    ):
        del names[head]

    def fill(entry: Entry, descriptor: int, offset: int) -> None:
        tensor = parts.joined(names[entry.name])
        if entry.name in factors:
            first, second = (parts.joined(factors[entry.name][kind]).float() for kind in "AB")
            tensor = tensor.float() + scale * (second @ first)
        tensor = tensor.to(entry.work).contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{shards}: {entry.name} joins to {list(tensor.shape)}, not {list(entry.shape)}")
        if tensor.numel():
            write_at(descriptor, raw_bytes(tensor.reshape(1, -1)), offset)

    entries = tuple(_entry(parts, stored, name, dtype) for stored, name in names.items())
    write_shards([Shard(file=WEIGHTS, entries=entries)], folder, fill=fill, workers=1)


def _factors(parts: Parts, shards: Path) -> dict[str, dict[str, str]]:
    """Return the names of both factors by the weight that they adapt, without the names of wrappers.

    Raises:
        UnsupportedError: other parts of an adapter than the factors of linear layers.
    """
    found: dict[str, dict[str, str]] = {}
    for name in parts.names:
        match = _FACTOR.fullmatch(name)
        if match is not None and len(parts.form(name)[1]) == 2:
            found.setdefault(f"{without_wrappers(match['module'])}.weight", {})[match["kind"]] = name
        elif is_lora(name) or "modules_to_save" in name or "original_module" in name:
            raise UnsupportedError(f"{shards}: {name}: of adapters only the factors of linear layers are merged here")
    lone = [weight for weight, kinds in found.items() if len(kinds) != 2]
    if lone:
        raise UnsupportedError(f"{shards}: one factor alone of {lone[0]}")
    return found


def _scale(parts: Parts, factors: dict[str, dict[str, str]], shards: Path) -> float:
    """Return what the product of factors is multiplied by, as its trainer wrote it beside the shards.

    verl writes `lora_train_meta.json`, and PEFT's own config in `lora_adapter/`.

    Raises:
        UnsupportedError: it is written nowhere, or the ranks differ.
    """
    known: dict[str, Any] = {}
    for file in (shards / "lora_adapter" / ADAPTER_CONFIG, shards / "lora_train_meta.json"):
        known |= read_json(file) if file.is_file() else {}
    alpha = known.get("lora_alpha")
    if type(alpha) not in (int, float) or not alpha:
        raise UnsupportedError(
            f"{shards}: the shards of a LoRA, and its scale (lora_alpha) is neither in lora_train_meta.json nor in "
            f"lora_adapter/{ADAPTER_CONFIG}: write it there"
        )
    ranks = {parts.form(kinds["A"])[1][0] for kinds in factors.values()}
    if len(ranks) > 1 or known.get("alpha_pattern") or known.get("use_dora"):
        raise UnsupportedError(f"{shards}: a LoRA of several ranks or scales, or DoRA: export the adapter itself")
    rank = float(ranks.pop())
    return float(alpha) / (rank**0.5 if known.get("use_rslora") is True else rank)


def _entry(parts: Parts, stored: str, name: str, dtype: torch.dtype | None) -> Entry:
    own, shape = parts.form(name)
    written = own if dtype is None or not own.is_floating_point else dtype
    code = _CODES.get(str(written).removeprefix("torch."))
    if code is None:
        raise UnsupportedError(f"{parts.path}: {name} is {written}, which is not written here")
    source = Span(path=parts.path, begin=0, end=0, dtype=code)
    return Entry(name=stored, dtype=code, shape=shape, source=source, work=written)


def _dtype(name: Any) -> torch.dtype | None:
    import torch

    return getattr(torch, name) if name in FLOAT_NAMES.values() else None
