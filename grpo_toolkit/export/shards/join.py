"""Parts of tensors joined into safetensors: a model's, or an adapter's beside its base's."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, WEIGHTS
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.tensor_names import is_lora, without_wrappers
from grpo_toolkit.checkpoint.weights.shard_writer import Entry, Shard, Span, write_at, write_shards
from grpo_toolkit.checkpoint.weights.tensor_blocks import raw_bytes
from grpo_toolkit.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_ADAPTER: Final = "adapter"
_FACTOR: Final = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<kind>[AB])\.(?:\w+\.)?weight")
_CODES: Final = {name: code for code, name in FLOAT_NAMES.items()} | {"int64": "I64", "int32": "I32", "bool": "BOOL"}


class Parts(Protocol):
    """The parts of a model's tensors, however they lie."""

    path: Path
    names: list[str]

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return a whole tensor's dtype and shape."""

    def joined(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The adapter among the shards: its rank (None without one), the modules it adapts, its folder's name."""

    rank: int | None = None
    modules: list[str]
    folder: str = _ADAPTER

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def join(parts: Parts, shards: Path, folder: Path) -> Factors:
    """Write `model.safetensors` of parts into a folder whose config says the dtype and the tie.

    Factors of an adapter go into a folder of their own in it, as PEFT saves them.

    Raises:
        UnsupportedError: whole modules that an adapter trained, ranks that differ, or a dtype that is not written.
    """
    import torch

    config = read_json(folder / CONFIG)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    dtype = _dtype(config.get("dtype", config.get("torch_dtype")) or text.get("dtype", text.get("torch_dtype")))
    names = {without_wrappers(name): name for name in parts.names if not is_lora(name)}
    if any("modules_to_save" in name or "original_module" in name for name in parts.names):
        raise UnsupportedError(f"{shards}: the shards of an adapter with whole modules (modules_to_save)")
    head = next((name for name in names if name.endswith(_HEAD)), None)
    embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is True
    if is_tied and head and embedding and torch.equal(parts.joined(names[head]), parts.joined(names[embedding])):
        del names[head]
    factors = _factors(parts, shards)
    if factors.modules:
        (folder / _ADAPTER).mkdir()
        _write(parts, _names_of_factors(parts), folder / _ADAPTER, ADAPTER_WEIGHTS, None)
    _write(parts, names, folder, WEIGHTS, dtype)
    return factors


def _names_of_factors(parts: Parts) -> dict[str, str]:
    found = {name: match for name in parts.names if (match := _FACTOR.fullmatch(name))}
    return {f"base_model.model.{match['module']}.lora_{match['kind']}.weight": name for name, match in found.items()}


def _factors(parts: Parts, shards: Path) -> Factors:
    stored = [name for name in parts.names if is_lora(name)]
    found = {name: match for name in stored if (match := _FACTOR.fullmatch(name))}
    if len(found) != len(stored):
        strange = next(name for name in stored if name not in found)
        raise UnsupportedError(f"{shards}: {strange} is no factor of a plain LoRA")
    ranks = {parts.form(name)[1][0] for name, match in found.items() if match["kind"] == "A"}
    if len(ranks) > 1:
        raise UnsupportedError(f"{shards}: a LoRA of several ranks ({sorted(ranks)})")
    return Factors(rank=ranks.pop() if ranks else None, modules=sorted({match["module"] for match in found.values()}))


def write_adapter_config(factors: Factors, shards: Path, folder: Path, base: Path) -> None:
    """Write the config of an adapter that was found among shards, with the scale that its trainer wrote beside them.

    verl writes `lora_train_meta.json`, and PEFT's own config in `lora_adapter/`.

    Raises:
        UnsupportedError: the scale is written nowhere.
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
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": factors.rank, "lora_alpha": alpha,
        "use_rslora": known.get("use_rslora") is True, "target_modules": factors.modules, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": str(base.absolute()),
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(dump_json(config), encoding="utf-8")


def _write(parts: Parts, names: Mapping[str, str], folder: Path, file: str, dtype: torch.dtype | None) -> None:
    entries = [_entry(parts, stored, name, dtype) for stored, name in names.items()]

    def fill(entry: Entry, descriptor: int, offset: int) -> None:
        stored, name = entry.work
        tensor = parts.joined(name).to(stored).contiguous()
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(f"{parts.path}: {name} joins to {list(tensor.shape)}, not {list(entry.shape)}")
        if tensor.numel():
            write_at(descriptor, raw_bytes(tensor.reshape(1, -1)), offset)

    write_shards([Shard(file=file, entries=tuple(entries))], folder, fill=fill, workers=1)


def _entry(parts: Parts, stored: str, name: str, dtype: torch.dtype | None) -> Entry:
    own, shape = parts.form(name)
    written = own if dtype is None or not own.is_floating_point else dtype
    code = _CODES.get(str(written).removeprefix("torch."))
    if code is None:
        raise UnsupportedError(f"{parts.path}: {name} is {written}, which is not written here")
    source = Span(path=parts.path, begin=0, end=0, dtype=code)
    return Entry(name=stored, dtype=code, shape=shape, source=source, work=(written, name))


def _dtype(name: Any) -> torch.dtype | None:
    import torch

    return getattr(torch, name) if name in FLOAT_NAMES.values() else None
