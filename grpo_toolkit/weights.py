"""The weights of an export, in its base's dtypes: an adapter merged, files copied, or a live model saved."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cache import base_model
from grpo_toolkit.checkpoint import (
    GENERATION_CONFIG,
    WEIGHTS_INDEX,
    Kind,
    base_of_adapter,
    dump_json,
    open_checkpoint,
    read_json,
)
from grpo_toolkit.distributed import gather, is_sharded
from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.inference import auto_class
from grpo_toolkit.merge.adapter import find_adapter, open_adapter
from grpo_toolkit.merge.base import open_base
from grpo_toolkit.merge.live import adapter_state, is_adapted, refuse_resized, saved_adapter
from grpo_toolkit.merge.merge import merge_weights
from grpo_toolkit.merge.plan import plan_updates
from grpo_toolkit.reading import FLOAT_NAMES
from grpo_toolkit.recast import copy_weights, plan_copy
from grpo_toolkit.saving import generation_config_of, inference_defaults, published_names, saved_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from grpo_toolkit.defaults import InferenceDefaults
    from grpo_toolkit.stream import Shard


def stored_dtypes(folder: Path) -> dict[str, str]:
    """torch's name for the dtype of every floating-point tensor in a folder."""
    tensors = open_checkpoint(folder).tensors()
    return {name: FLOAT_NAMES[info.dtype] for name, info in tensors.items() if info.dtype in FLOAT_NAMES}


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
    link: bool = False,
    max_shard_size: str | int | None = None,
) -> None:
    """Write weights and generation config into `staging`.

    Args:
        model: what is exported; its weights are read only where there is no folder to take them from.
        weights: those of a live model, or of a sharded model's adapter, as `gather_weights` gives them.
        staging: an existing folder.
        base: the base's folder: its names and dtypes are the export's.
        folder: where `model` came from, if it was a folder.
        copied: how to take that folder's own files (`copied_shards`); empty where that cannot be.
        stored: dtypes of the base's tensors (`stored_dtypes`).
        dtype: for a model that is saved: what its floating-point weights are stored as.
        defaults: what the generation config says, where the base has none to carry.
        link: see `export_model`.
        max_shard_size: see `export_model`.
    """
    if is_adapted(model) or (folder is not None and open_checkpoint(folder).kind is Kind.ADAPTER):
        _write_merged(model, weights, staging, base, folder=folder, max_shard_size=max_shard_size)
    elif folder is not None and copied:
        copy_weights(open_checkpoint(folder), copied, staging, link=link)
    else:
        _write_saved(
            base_model(model), weights, staging, stored, dtype=dtype, defaults=defaults, max_shard_size=max_shard_size
        )
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
    max_shard_size: str | int | None,
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
        merge_weights(adapter, origin, staging, updates=updates, allow_unchanged=True, max_shard_size=max_shard_size)


def copied_shards(folder: Path, base: Path, *, max_shard_size: str | int | None = None) -> list[Shard]:
    """How to take a folder's own files for an export.

    Empty for an adapter, and where the weights can only be exported by loading them: others than the base's, or none
    in safetensors.
    """
    source, origin = open_checkpoint(folder), open_checkpoint(base)
    if source.kind is Kind.ADAPTER or not (source.tensors() and origin.tensors()):
        return []
    return plan_copy(source, open_base(origin), max_shard_size=max_shard_size) or []


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
    max_shard_size: str | int | None,
) -> None:
    """Let the library save a model under published names, then give every tensor the base's dtype."""
    weights = weights if weights is not None else gather_weights(plain, dtype=dtype, stored=stored)
    sizes: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with inference_defaults(plain, defaults), published_names(plain):
        # The class's own method: a save hook on the instance would do the same again, with other overrides.
        type(plain).save_pretrained(plain, staging, state_dict=weights, **sizes)
    _recast_files(staging, stored, dtype)


def _recast_files(folder: Path, wanted: Mapping[str, str], default: torch.dtype) -> None:
    """Rewrite saved weights, shard by shard, in the dtype that `wanted` gives each name; not where they have it."""
    import torch
    from safetensors.torch import load_file, save_file

    usual = str(default).removeprefix("torch.")
    if all(dtype == wanted.get(name, usual) for name, dtype in stored_dtypes(folder).items()):
        return
    total = 0
    for path in open_checkpoint(folder).weight_files():
        weights = {
            name: tensor.to(getattr(torch, wanted.get(name, usual))) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        total += sum(tensor.nbytes for tensor in weights.values())
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        data = read_json(index)
        data["metadata"] = {**data.get("metadata", {}), "total_size": total}
        index.write_text(dump_json(data), encoding="utf-8")
