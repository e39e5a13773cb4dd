"""The weights of an export, in its base's dtypes: an adapter merged, files copied, or a live model saved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import WEIGHTS_INDEX, open_checkpoint
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES, read_safetensors_header
from grpo_toolkit.checkpoint.tensor_names import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, is_embedding, names_by_live
from grpo_toolkit.checkpoint.weights.copy_weights import added_entry, copy_weights, rewrite_shard, write_shard
from grpo_toolkit.checkpoint.weights.shard_plan import named_dtype
from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.export.live_adapter import adapter_state, refuse_resized, saved_adapter
from grpo_toolkit.merge.adapter import find_adapter, open_adapter
from grpo_toolkit.merge.merge import merge_weights
from grpo_toolkit.merge.plan import plan_updates
from grpo_toolkit.model.live_model import is_tied
from grpo_toolkit.model.saving.save_hook import generation_config_of, inference_defaults, published_names, saved_state
from grpo_toolkit.model.sharding.gather import gather, is_sharded
from grpo_toolkit.model.unheld_tensors import unheld_groups

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.export.export_plan import ExportPlan

# Beside the library's shards: what of the base it did not save.
_ADDED: Final = "model-added.safetensors"


def gather_weights(plan: ExportPlan) -> dict[str, torch.Tensor] | None:
    """Gather the weights on rank 0, of a sharded model's adapter alone; None where they are taken from files.

    Collective where the model is sharded; other ranks get an empty dict.
    """
    model = plan.source.model
    if plan.source.is_adapter:
        return gather(adapter_state(model)) if is_sharded(model) else None
    if plan.source.shards:
        return None
    # A base of mixed dtypes (float32 norms, say) is cast after saving, when the names are the published ones.
    return gather(saved_state(model), dtype=None if len(set(plan.stored.values())) > 1 else plan.dtype)


def write_weights(plan: ExportPlan, weights: dict[str, torch.Tensor] | None, staging: Path) -> None:
    """Write weights and generation config into `staging`.

    Args:
        plan: an adapter is merged, a folder's files are copied where they can be, any other model is saved.
        weights: as `gather_weights` returned them.
        staging: an existing folder.
    """
    source, storage = plan.source, plan.storage
    if source.is_adapter:
        _write_merged(plan, weights, staging)
    elif source.shards and source.folder is not None:
        copy_weights(
            source.folder, source.tensors, source.shards, staging, link=storage.link, progress=storage.progress
        )
    else:
        _write_saved(plan, weights, staging)
        return
    generation_config = generation_config_of(plan.defaults)
    if generation_config is not None:
        generation_config.save_pretrained(staging)


def _write_merged(plan: ExportPlan, weights: dict[str, torch.Tensor] | None, staging: Path) -> None:
    """Merge an adapter (a live model's, or a folder's) into the base's files, streamed.

    What the adapter leaves as it is may stay so: modules that no gradient reached, a run without a reward.
    """
    source, storage = plan.source, plan.storage
    if source.base is None:
        name = getattr(source.plain.config, "_name_or_path", None)
        raise UnsupportedError(
            f"an adapter is merged into its base from disk, and the base {name!r} is no folder here; pass base="
        )
    refuse_resized(source.model, source.base)
    saved = saved_adapter(source.model, weights) if source.folder is None else nullcontext(find_adapter(source.folder))
    with saved as folder:
        adapter = open_adapter(folder)
        merge_weights(
            adapter,
            source.base,
            staging,
            updates=plan_updates(adapter, source.base),
            allow_unchanged=True,
            names=source.renames,
            dtype=storage.dtype,
            max_shard_size=storage.max_shard_size,
            progress=storage.progress,
        )


def _write_saved(plan: ExportPlan, weights: dict[str, torch.Tensor] | None, staging: Path) -> None:
    """Let the library save a model under published names, then give every tensor the base's dtype.

    What the base stores beside that is added: the library leaves out what its class does not hold, and a tied head.
    """
    plain, size = plan.source.plain, plan.storage.max_shard_size
    sizes: dict[str, Any] = {} if size is None else {"max_shard_size": size}
    with inference_defaults(plain, plan.defaults), published_names(plain, turned=True):
        # The class's own method: a save hook on the instance would do the same again, with other overrides.
        type(plain).save_pretrained(plain, staging, state_dict=weights, **sizes)
    _recast_files(plan, staging)
    if plan.source.base is not None:
        _add_unsaved(plan, plan.source.base, staging)


def _recast_files(plan: ExportPlan, folder: Path) -> None:
    """Rewrite saved weights, file by file, with new names and the base's dtypes, where they have others."""
    saved = open_checkpoint(folder)
    tensors = saved.tensors()
    renames = plan.storage.renames(tensors, plan.source.plain.config.model_type)
    usual = str(plan.dtype).removeprefix("torch.")
    dtypes = {
        name: named_dtype(plan.stored.get(renames.get(name, name), usual))
        for name, info in tensors.items()
        if info.dtype in FLOAT_NAMES
    }
    if not renames and all(dtype == tensors[name].dtype for name, dtype in dtypes.items()):
        return
    for path in saved.weight_files():
        original = path.rename(path.with_suffix(".original"))
        rewrite_shard(original, path, renames=renames, dtypes=dtypes)
        original.unlink()
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX)["weight_map"]
        _write_index(folder, {renames.get(name, name): file for name, file in weight_map.items()})


def _add_unsaved(plan: ExportPlan, base: Base, folder: Path) -> None:
    """Add the tensors of the base that the library did not save: its own bytes, or a tied head's second copy.

    A tensor that belongs into the model and was not saved is not made up for: verification finds it missing.
    """
    checkpoint = open_checkpoint(folder)
    files, tensors = checkpoint.weight_files(), checkpoint.tensors()
    saved = names_by_live(tensors, base.family)
    unsaved = [live for live in base.stored if live not in saved]
    heads = [live for live in unsaved if is_embedding(live, OUTPUT_EMBEDDINGS)] if is_tied(plan.source.plain) else []
    others = sorted(base.stored[live] for live in unsaved if live not in heads)
    carried = others if others and unheld_groups(plan.source.plain, base.tensors, {"": others}) else []
    if not heads and not carried:
        return
    names, dtype = plan.source.renames, plan.storage.dtype
    added = [added_entry(names.get(name, name), base.tensors[name], base.path, dtype=dtype) for name in carried]
    original = files[0].rename(files[0].with_suffix(".original")) if len(files) == 1 else None
    for head in heads:
        [inputs] = [tensors[name] for live, name in saved.items() if is_embedding(live, INPUT_EMBEDDINGS)]
        twin = inputs if original is None else replace(inputs, file=original.name)
        name = base.stored[head]
        added.append(added_entry(names.get(name, name), twin, folder, dtype=dtype or base.tensors[name].dtype))
    if original is not None:
        rewrite_shard(original, files[0], renames={}, dtypes={}, added=added)
        original.unlink()
    else:
        write_shard(_ADDED, added, folder)
        weight_map = read_json(folder / WEIGHTS_INDEX)["weight_map"]
        _write_index(folder, weight_map | dict.fromkeys((entry.name for entry in added), _ADDED))


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    index = read_json(folder / WEIGHTS_INDEX)
    headers = [read_safetensors_header(folder / file) for file in sorted(set(weight_map.values()))]
    total = sum(info.nbytes for tensors in headers for info in tensors.values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    index["weight_map"] = dict(sorted(weight_map.items()))
    (folder / WEIGHTS_INDEX).write_text(dump_json(index), encoding="utf-8")
