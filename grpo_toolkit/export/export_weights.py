"""The weights of an export, in its base's dtypes: an adapter merged, files copied, or a live model saved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.model_folder import CONFIG, GENERATION_CONFIG, WEIGHTS_INDEX, Kind, open_checkpoint
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.checkpoint.weights.copy_weights import copy_weights, plan_copy
from grpo_toolkit.doctor.compat import published_renames
from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.export.live_adapter import adapter_state, is_adapted, refuse_resized, saved_adapter
from grpo_toolkit.merge.adapter import find_adapter, open_adapter
from grpo_toolkit.merge.merge import merge_weights
from grpo_toolkit.merge.plan import plan_updates
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.load import auto_class
from grpo_toolkit.model.save_hook import generation_config_of, inference_defaults, published_names, saved_state
from grpo_toolkit.model.sharding.gather import gather, is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress, Shard


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the weights of an export are stored.

    Attributes:
        dtype: safetensors' name of the dtype of every floating-point tensor ("BF16"); None for the base's own.
        compat: "all" for the names that the family is published with, "v5" for the base's.
        max_shard_size: largest weight file, such as "5GB"; None for a folder's (or the base's) own files.
        link: hard links in place of copies, where the file system has them.
        progress: told the bytes done and the bytes in all.
    """

    dtype: str | None = None
    compat: str = "all"
    max_shard_size: str | int | None = None
    link: bool = False
    progress: Progress | None = None

    def renames(self, names: Iterable[str], model_type: object) -> dict[str, str]:
        """New names for tensors that are called otherwise than published."""
        return published_renames(names, model_type, compat=self.compat)


def stored_dtypes(folder: Path, storage: Storage = Storage()) -> dict[str, str]:
    """torch's name for the dtype of every floating-point tensor, as an export of the folder's tensors stores them."""
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.tensors()
    renames = storage.renames(tensors, read_json(folder / CONFIG).get("model_type"))
    floats = {name: info.dtype for name, info in tensors.items() if info.dtype in FLOAT_NAMES}
    return {renames.get(name, name): FLOAT_NAMES[storage.dtype or dtype] for name, dtype in floats.items()}


def unloaded_model(folder: Path, *, base: Path | None = None) -> PreTrainedModel:
    """A folder's model (an adapter's base) with its configs and without its weights, on the meta device.

    Raises:
        CheckpointError: an adapter whose base is not here.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    if open_checkpoint(folder).kind is Kind.ADAPTER:
        folder = base or base_of_adapter(folder)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(folder).from_config(AutoConfig.from_pretrained(folder))
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def write_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor] | None,
    staging: Path,
    base: Path | None,
    *,
    folder: Path | None,
    copied: Sequence[Shard],
    stored: Mapping[str, str],
    dtype: torch.dtype,
    defaults: InferenceDefaults,
    storage: Storage,
) -> None:
    """Write weights and generation config into `staging`.

    Args:
        model: what is exported; its weights are read only where there is no folder to take them from.
        weights: those of a live model, or of a sharded model's adapter, as `gather_weights` gives them.
        staging: an existing folder.
        base: the base's folder: its names and dtypes are the export's.
        folder: where `model` came from, if it was a folder.
        copied: how to take that folder's own files (`copied_shards`); empty where that cannot be.
        stored: what the base's tensors are stored as (`stored_dtypes`).
        dtype: for a model that is saved: what its floating-point weights are stored as.
        defaults: what the generation config says, where the base has none to carry.
        storage: how they are stored.
    """
    if is_adapted(model) or (folder is not None and open_checkpoint(folder).kind is Kind.ADAPTER):
        _write_merged(model, weights, staging, base, folder=folder, storage=storage)
    elif folder is not None and copied:
        copy_weights(open_checkpoint(folder), copied, staging, link=storage.link, progress=storage.progress)
    else:
        _write_saved(base_model(model), weights, staging, stored, dtype=dtype, defaults=defaults, storage=storage)
        return
    generation_config = generation_config_of(defaults)
    if generation_config is not None:
        generation_config.save_pretrained(staging)


def _write_merged(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor] | None,
    staging: Path,
    base: Path | None,
    *,
    folder: Path | None,
    storage: Storage,
) -> None:
    """Merge an adapter (of a live model, or a folder's) into the base's files, streamed.

    What the adapter leaves as it is may stay so: modules that no gradient reached, a run without a reward.
    """
    if base is None:
        name = getattr(base_model(model).config, "_name_or_path", None)
        raise UnsupportedError(
            f"an adapter is merged into its base from disk, and the base {name!r} is no folder here; pass base="
        )
    origin = open_base(open_checkpoint(base))
    refuse_resized(model, origin)
    with nullcontext(find_adapter(folder)) if folder is not None else saved_adapter(model, weights) as saved:
        adapter = open_adapter(saved)
        updates = plan_updates(adapter, origin)
        merge_weights(
            adapter,
            origin,
            staging,
            updates=updates,
            allow_unchanged=True,
            names=storage.renames(origin.tensors, origin.config.get("model_type")),
            dtype=storage.dtype,
            max_shard_size=storage.max_shard_size,
            progress=storage.progress,
        )


def copied_shards(folder: Path, base: Path, storage: Storage = Storage()) -> list[Shard]:
    """How to take a folder's own files for an export.

    Empty for an adapter, and where the weights can only be exported by loading them: others than the base's, or none
    in safetensors.
    """
    source, origin = open_checkpoint(folder), open_checkpoint(base)
    if source.kind is Kind.ADAPTER or not (source.tensors() and origin.tensors()):
        return []
    known = open_base(origin)
    names = storage.renames(known.tensors, known.config.get("model_type"))
    return plan_copy(source, known, names=names, dtype=storage.dtype, max_shard_size=storage.max_shard_size) or []


def gather_weights(
    model: torch.nn.Module, *, dtype: torch.dtype, stored: Mapping[str, str]
) -> dict[str, torch.Tensor] | None:
    """What is to be exported, whole on rank 0: the weights, or a sharded model's adapter; None for any other adapter.

    Collective where the model is sharded; other ranks get an empty dict.
    """
    if is_adapted(model):
        return gather(adapter_state(model)) if is_sharded(model) else None
    # A base of mixed dtypes (float32 norms, say) is cast after saving, when the names are the published ones.
    return gather(saved_state(model), dtype=None if len(set(stored.values())) > 1 else dtype)


def _write_saved(
    plain: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    staging: Path,
    stored: Mapping[str, str],
    *,
    dtype: torch.dtype,
    defaults: InferenceDefaults,
    storage: Storage,
) -> None:
    """Let the library save a model under published names, then give every tensor the base's dtype."""
    weights = weights if weights is not None else gather_weights(plain, dtype=dtype, stored=stored)
    sizes: dict[str, Any] = {} if storage.max_shard_size is None else {"max_shard_size": storage.max_shard_size}
    with inference_defaults(plain, defaults), published_names(plain):
        # The class's own method: a save hook on the instance would do the same again, with other overrides.
        type(plain).save_pretrained(plain, staging, state_dict=weights, **sizes)
    saved = open_checkpoint(staging).tensors()
    _recast_files(staging, stored, dtype, renames=storage.renames(saved, plain.config.model_type))


def _recast_files(
    folder: Path, wanted: Mapping[str, str], default: torch.dtype, *, renames: Mapping[str, str]
) -> None:
    """Rewrite saved weights, shard by shard, with new names and the dtypes that `wanted` gives each of those.

    Nothing is written where they have them already.
    """
    import torch
    from safetensors.torch import load_file, save_file

    usual = str(default).removeprefix("torch.")
    found = stored_dtypes(folder, Storage(compat="v5"))  # under the names that they have
    if not renames and all(dtype == wanted.get(name, usual) for name, dtype in found.items()):
        return
    total = 0
    for path in open_checkpoint(folder).weight_files():
        loaded = {renames.get(name, name): tensor for name, tensor in load_file(path).items()}
        weights = {
            name: tensor.to(getattr(torch, wanted.get(name, usual))) if tensor.is_floating_point() else tensor
            for name, tensor in loaded.items()
        }
        total += sum(tensor.nbytes for tensor in weights.values())
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        data = read_json(index)
        data["metadata"] = {**data.get("metadata", {}), "total_size": total}
        data["weight_map"] = {renames.get(name, name): file for name, file in data["weight_map"].items()}
        index.write_text(dump_json(data), encoding="utf-8")
