"""An adapter merged into its base, tensor by tensor: never a model in memory.

    headers and configs -> a plan -> unchanged bytes copied, changed rows computed -> index -> published

The arithmetic is float32 (float64 for a float64 base), the result is rounded once, to the base's dtype. What is not
supported is refused before anything is written, and every tensor of the adapter has to find its place in the base and
change it: a merge that did nothing, or half of it, fails and says where.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.base_files import carried_files, copy_files, declare_dtype, write_configs
from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter, named_base
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.manifest import write_manifest
from grpo_toolkit.checkpoint.publish import check_output, staged
from grpo_toolkit.checkpoint.safetensors_header import DTYPE_BITS, FLOAT_NAMES
from grpo_toolkit.checkpoint.short_repr import ShortRepr
from grpo_toolkit.checkpoint.weights.base_weights import Base, open_base
from grpo_toolkit.checkpoint.weights.shard_plan import named_dtype, plan_shards, refuse_full_disk
from grpo_toolkit.checkpoint.weights.shard_writer import write_shards
from grpo_toolkit.checkpoint.weights.tensor_blocks import single_threaded, worker_count
from grpo_toolkit.doctor.compat import check_compat, published_renames, write_older_forms
from grpo_toolkit.errors import VerificationError
from grpo_toolkit.merge.adapter import Adapter, find_adapter, open_adapter
from grpo_toolkit.merge.low_rank import LowRank, Update
from grpo_toolkit.merge.plan import plan_updates
from grpo_toolkit.merge.tensor_merger import TensorMerger

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from grpo_toolkit.checkpoint.generation_defaults import Repair
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress

_ALLOW: Final = "if that is meant, allow_unchanged=True (--allow-unchanged)"


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeResult(ShortRepr):
    """A merged model.

    Attributes:
        path: its folder.
        base: the base's folder.
        adapter: the adapter's folder.
        changed: the stored tensors that the merge changed, by their names in the base.
        unchanged: those that it reached without changing their rounded values; empty unless that was allowed.
        copied: how many tensors are the base's, byte for byte (rounded, where `dtype` asks for another one).
        repairs: values that were wrong in the base and are right in the merge.
        made_portable: what was changed in files that transformers 5 wrote, so that 4.x and servers can read them too.
        bytes: of all the tensors.
        seconds: how long it took.
    """

    path: Path
    base: Path
    adapter: Path
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    copied: int
    repairs: tuple[Repair, ...]
    made_portable: tuple[str, ...]
    bytes: int
    seconds: float


def merge_adapter(
    adapter: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
    allow_unchanged: bool = False,
    max_shard_size: str | int | None = None,
    dtype: str | None = None,
    compat: str = "all",
    progress: Progress | None = None,
) -> MergeResult:
    """Merge a LoRA adapter into its base and publish the result as a model folder with the base's own files.

    Supported: LoRA, rsLoRA and DoRA on linear, Conv1D, convolution and embedding layers, ranks and alphas by pattern,
    `modules_to_save`, trained biases, `target_parameters` (stacked experts, stored stacked or one by one), in any
    spelling of the names that `tensor_names.py` lists. Peak memory is the imports and some blocks of a tensor.

    Args:
        adapter: a folder as PEFT saves it; one with several adapters needs `adapter_name`.
        output_dir: the folder to publish; its parent must be writable.
        base: folder or Hub name of the base; by default the one that the adapter names. Nothing is downloaded.
        adapter_name: which adapter of the folder ("default" is the one at its top).
        overwrite: replace an earlier export or merge in `output_dir`.
        allow_unchanged: publish although some of the adapter changes nothing (an untrained one, or changes that the
            base's dtype rounds away).
        max_shard_size: largest weight file, such as "5GB"; by default the files are the base's.
        dtype: of every floating-point tensor ("float16"); by default the base's.
        compat: "all": forms that transformers 4 and servers read too, where the base has none; "v5": the base's alone.
        progress: called with the bytes done and the bytes in all.

    Raises:
        UnsupportedError: an option of the adapter, or a base, that is not merged here; the message names it.
        CheckpointError: adapter or base cannot be read, or do not belong together.
        OutputExistsError: `output_dir` is there and may not be replaced.
        VerificationError: values that are not finite, or tensors that did not change; nothing was published.
    """
    started = time.monotonic()
    target = Path(output_dir)
    check_output(target, overwrite=overwrite)
    check_compat(compat)
    stored_dtype = None if dtype is None else named_dtype(dtype)
    found = open_adapter(find_adapter(adapter, adapter_name))
    origin = open_base(open_checkpoint(base_of_adapter(found.path) if base is None else named_base(base)))
    updates = plan_updates(found, origin)
    if not allow_unchanged:
        _refuse_untrained(found, updates)
    with staged(target, overwrite=overwrite) as staging:
        merged = merge_weights(
            found,
            origin,
            staging,
            updates=updates,
            allow_unchanged=allow_unchanged,
            names=published_renames(origin.tensors, origin.config.get("model_type"), compat=compat),
            dtype=stored_dtype,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        written = write_configs(origin.path, staging)
        copy_files(carried_files(origin.path), origin.path, staging)
        if stored_dtype is not None:
            declare_dtype(staging, FLOAT_NAMES[stored_dtype])
        made_portable = write_older_forms(staging) if compat == "all" else ()
        write_manifest(
            staging,
            {
                "base": origin.path.name,
                "adapter": found.path.name,
                "changed_tensors": len(merged.changed),
                "unchanged_tensors": list(merged.unchanged),
                "put_right": [asdict(repair) for repair in written.repairs],
                "made_portable": list(made_portable),
                "verification": None,
            },
            sums=False,
        )
    return MergeResult(
        path=target,
        base=origin.path,
        adapter=found.path,
        changed=merged.changed,
        unchanged=merged.unchanged,
        copied=merged.copied,
        repairs=written.repairs,
        made_portable=made_portable,
        bytes=merged.bytes,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, kw_only=True)
class MergedWeights:
    """The tensors that `merge_weights` wrote, by their names in the base."""

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    copied: int
    bytes: int


def merge_weights(
    adapter: Adapter,
    base: Base,
    folder: Path,
    *,
    updates: Mapping[str, Update],
    allow_unchanged: bool = False,
    names: Mapping[str, str] | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    progress: Progress | None = None,
) -> MergedWeights:
    """Write the base's weights with the adapter merged into them.

    Args:
        adapter: what is merged.
        base: what it is merged into.
        folder: where to; an existing folder.
        updates: as `plan_updates` gives them.
        allow_unchanged: see `merge_adapter`.
        names: what tensors of the base are called in the output, where that is something else.
        dtype: safetensors' name of a dtype for every floating-point tensor instead of the base's ("BF16").
        max_shard_size: see `merge_adapter`.
        progress: see `merge_adapter`.

    Raises:
        VerificationError, InputError: see `merge_adapter`.
    """
    floats = [] if dtype is None else [name for name, info in base.tensors.items() if info.dtype in FLOAT_NAMES]
    cast = {name: Update() for name in floats if base.tensors[name].dtype != dtype}  # as it is, but for its dtype
    shards = plan_shards(
        base.path,
        base.tensors,
        work={**cast, **updates},
        names=names,
        dtypes=dict.fromkeys(floats, dtype or ""),
        max_shard_size=max_shard_size,
    )
    refuse_full_disk(folder, shards)
    with TensorMerger(adapter, base, names) as merger, single_threaded() as setup:
        write_shards(shards, folder, fill=merger.fill, workers=worker_count(), setup=setup, progress=progress)
    unchanged = tuple(name for name in updates if name not in merger.changed)
    if unchanged and not allow_unchanged:
        some = ", ".join(unchanged[:4]) + (", ..." if len(unchanged) > 4 else "")
        raise VerificationError(
            f"not published: {len(unchanged)} of the {len(updates)} tensors that {adapter.path} adapts came out as "
            f"the base has them ({some}): what is added is zero, or smaller than their dtype can say; {_ALLOW}"
        )
    return MergedWeights(
        changed=tuple(name for name in updates if name in merger.changed),
        unchanged=unchanged,
        copied=len(base.tensors) - len(updates),
        bytes=sum(shard.nbytes for shard in shards),
    )


def _refuse_untrained(adapter: Adapter, updates: Mapping[str, Update]) -> None:
    """Find out before the work what training leaves of an adapter that never learnt: one factor of each pair zero."""
    with adapter.weights.open("rb") as file:

        def is_zero(name: str) -> bool:
            info = adapter.tensors[name]
            file.seek(info.span[0])
            raw, width = file.read(info.nbytes), DTYPE_BITS[info.dtype] // 8
            # Little-endian: the last byte of a number has its sign, which zeros may have too.
            return not any(any(raw[byte::width]) for byte in range(width - 1)) and set(raw[width - 1 :: width]) <= {
                0,
                128,
            }

        for update in updates.values():
            added = update.added
            if update.replaced_by or update.magnitude or not isinstance(added, LowRank):
                return
            if not (is_zero(added.b) or is_zero(added.a)):
                return
    raise VerificationError(
        f"{adapter.path}: untrained: a factor of each of its {len(updates)} pairs is zero, so the merge would be the "
        f"base; {_ALLOW}"
    )
