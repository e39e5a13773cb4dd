"""Publish a trained model as one folder that loads everywhere, says the same and decodes with its cache.

    gather the weights -> merge an adapter -> the base's own files -> verify in a fresh process -> publish

Everything happens in a staging folder beside the target; what fails on the way leaves nothing behind, and a folder
under the target's name has passed every check.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.adapter import open_adapter
from grpo_toolkit.cache import base_model, is_sharded, random_state_kept
from grpo_toolkit.checkpoint import (
    WEIGHTS_INDEX,
    check_output,
    dump_json,
    find_base,
    open_checkpoint,
    read_json,
    staged,
)
from grpo_toolkit.defaults import Repair, with_cache_defaults
from grpo_toolkit.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from grpo_toolkit.inference import load_model
from grpo_toolkit.manifest import write_manifest
from grpo_toolkit.merge import merge_weights
from grpo_toolkit.merge_live import is_adapted, refuse_resized, refuse_unmergeable, saved_adapter
from grpo_toolkit.merge_plan import open_base, plan_updates
from grpo_toolkit.portable import Change, config_changes, write_configs
from grpo_toolkit.processing import processor_of, write_processor
from grpo_toolkit.saving import base_folder, capture_model_defaults, inference_defaults
from grpo_toolkit.verify import VerificationResult, plain_request, policy_noise, policy_records, verify_export

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, Trainer

    from grpo_toolkit.defaults import InferenceDefaults
    from grpo_toolkit.inference import Record, Request

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A published export.

    Attributes:
        path: the folder.
        base: the folder of the base model whose files were carried, or None.
        repairs: values that were wrong in the base and are right in the export.
        changes: values that training changed and the export therefore carries.
        verification: every check with its figure, or None where verification was switched off.
        seconds: how long it all took.
    """

    path: Path
    base: Path | None
    repairs: tuple[Repair, ...]
    changes: tuple[Change, ...]
    verification: VerificationResult | None
    seconds: float


def export_model(
    source: Trainer | torch.nn.Module | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    requests: Sequence[Request] = (),
    generation_overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    device: str = "cpu",
) -> ExportResult:
    """Export a trained model for inference.

    Args:
        source: a trainer, a model (PEFT-wrapped or not), or a folder with a full model or a LoRA adapter.
        output_dir: the folder to publish; its parent must be writable.
        base: folder or Hub name of the base model; by default the one that the model or adapter names.
        processing_class: the processor or tokenizer used in training; by default the trainer's or the folder's.
        requests: prompts on which export and policy must give the same greedy tokens.
        generation_overrides: keys for `generation_config.json` that win over the base's.
        overwrite: replace an earlier export in `output_dir`.
        verify: reload the result in a fresh process and check it before publishing.
        device: where a folder is loaded; a live model stays where it is, and is verified there.

    Raises:
        OutputExistsError: `output_dir` is there and may not be replaced.
        CheckpointError: `source` or `base` is a folder that holds no model.
        UnsupportedError: the model is sharded over processes (FSDP, ZeRO-3); the message says what to do.
        VerificationError: a check failed; nothing was published.
    """
    started = time.monotonic()
    target = Path(output_dir)
    check_output(target, overwrite=overwrite)
    named_base = None if base is None else find_base(os.fspath(base))
    if base is not None and named_base is None:
        raise InputError(f"base {os.fspath(base)}: neither a model folder nor in the local Hub cache")
    with random_state_kept():
        model, processor = _open_source(source, processing_class, device, named_base)
        refuse_unsupported(model)
        origin = named_base or base_folder(model)
        processor = processor if processor is not None or origin is None else processor_of(origin)
        with staged(target, overwrite=overwrite) as staging:
            dtype = _export_dtype(model, origin)
            folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
            merged, defaults = _write_weights(
                model, staging, origin, folder=folder, dtype=dtype, overrides=generation_overrides
            )
            repairs, changes = _write_files(merged, processor, staging, origin, defaults)
            verification = None
            if verify:
                verification = _verify(model, processor, staging, origin, dtype=dtype, requests=requests)
            result = ExportResult(
                path=target,
                base=origin,
                repairs=repairs,
                changes=changes,
                verification=verification,
                seconds=time.monotonic() - started,
            )
            _write_manifest(staging, result)
    return result


def refuse_unsupported(model: torch.nn.Module) -> None:
    """Raise for models that cannot be exported; the callback asks before training.

    Raises:
        UnsupportedError: sharded weights (FSDP, ZeRO-3), or an adapter that cannot be merged.
    """
    if is_sharded(model):
        raise UnsupportedError(
            "the model is sharded over processes (FSDP or ZeRO-3), which a live export does not gather yet; save a "
            "full checkpoint with trainer.save_model() and export that folder"
        )
    refuse_unmergeable(model)


def _open_source(source: Any, processing_class: Any, device: str, base: Path | None) -> tuple[torch.nn.Module, Any]:
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        open_checkpoint(folder).tensors()  # a header that is damaged or cut off is named before anything is loaded
        try:
            model, processor, report = load_model(folder, device=device, base=base)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
        if not report.is_clean:
            raise InputError(
                f"{folder}: its weights do not fit its config (missing {report.missing[:2]}, "
                f"unexpected {report.unexpected[:2]}, mismatched {report.mismatched[:2]}); nothing was exported"
            )
        return model, processing_class if processing_class is not None else processor
    if hasattr(source, "model") and hasattr(source, "processing_class"):
        return source.model, processing_class if processing_class is not None else source.processing_class
    return source, processing_class


def _export_dtype(model: torch.nn.Module, base: Path | None) -> torch.dtype:
    """The dtype that most of the base's tensors are stored in; the model's own where there is no base.

    TRL loads a model given by name in float32 unless told otherwise: a bfloat16 base would come out twice its size.
    """
    import torch

    stored = [] if base is None else list(_stored_dtypes(base).values())
    dtype: torch.dtype = base_model(model).dtype
    return getattr(torch, max(set(stored), key=stored.count)) if stored else dtype


def _stored_dtypes(folder: Path) -> dict[str, str]:
    """torch's name for the dtype of every floating-point tensor in a folder."""
    tensors = open_checkpoint(folder).tensors()
    return {name: _DTYPES[info.dtype] for name, info in tensors.items() if info.dtype in _DTYPES}


def _write_weights(
    model: torch.nn.Module,
    staging: Path,
    base: Path | None,
    *,
    folder: Path | None,
    dtype: torch.dtype,
    overrides: Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, InferenceDefaults]:
    """Save the (merged) weights in the base's dtypes; returns the model that was saved and its defaults."""
    defaults = capture_model_defaults(model, base=base, overrides=overrides)
    plain = base_model(model)
    if is_adapted(model):
        _write_merged(model, staging, base, folder)
        return plain, defaults
    # A base of mixed dtypes (float32 norms, say) is cast after saving, when the names are the published ones.
    wanted = {} if base is None else _stored_dtypes(base)
    is_mixed = len(set(wanted.values())) > 1
    weights = plain.state_dict() if is_mixed else _cast(plain.state_dict(), dtype)
    with inference_defaults(plain, defaults):
        # The class's own method: a save hook on the instance would do the same again, with other overrides.
        type(plain).save_pretrained(plain, staging, state_dict=weights)
    if is_mixed:
        _recast_files(staging, wanted, dtype)
    return plain, defaults


def _write_merged(model: torch.nn.Module, staging: Path, base: Path | None, folder: Path | None) -> None:
    """Merge an adapter (of a live model, or a folder's) into the base's files, streamed; the model is not merged.

    What the adapter leaves as it is may stay so: modules that no gradient reached, a run without a reward.
    """
    if base is None:
        name = getattr(base_model(model).config, "_name_or_path", None)
        raise UnsupportedError(
            f"an adapter is merged into its base from disk, and the base {name!r} is no folder here; pass base="
        )
    origin = open_base(open_checkpoint(base))
    refuse_resized(model, origin)
    with nullcontext(folder) if folder is not None else saved_adapter(model) as saved:
        adapter = open_adapter(saved)
        merge_weights(adapter, origin, staging, updates=plan_updates(adapter, origin), allow_unchanged=True)


def _cast(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights on the CPU in `dtype`. Tied names go on sharing one tensor: saving finds ties by their storage."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state_dict.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state_dict.items()}


def _recast_files(folder: Path, wanted: Mapping[str, str], default: torch.dtype) -> None:
    """Rewrite saved weights in the dtype that `wanted` gives each name; shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    total = 0
    for path in open_checkpoint(folder).weight_files():
        weights = {
            name: tensor.to(getattr(torch, wanted[name]) if name in wanted else default)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in load_file(path).items()
        }
        total += sum(tensor.nbytes for tensor in weights.values())
        save_file(weights, path, metadata={"format": "pt"})
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        data = read_json(index)
        data["metadata"] = {**data.get("metadata", {}), "total_size": total}
        index.write_text(dump_json(data), encoding="utf-8")


def _write_files(
    model: PreTrainedModel, processor: Any, staging: Path, base: Path | None, defaults: InferenceDefaults
) -> tuple[tuple[Repair, ...], tuple[Change, ...]]:
    """Lay the base's own files over what the library saved; returns what was put right and what training changed."""
    if base is None:
        if processor is not None:
            processor.save_pretrained(staging)
        return defaults.repairs, ()
    loaded = with_cache_defaults(type(model.config).from_pretrained(base).to_dict(), defaults)
    trained = with_cache_defaults(model.config.to_dict(), defaults)
    changes = config_changes(loaded, trained)
    written = write_configs(base, staging, changes=changes, overrides=defaults.overrides)
    changed = write_processor(processor, base, staging)
    note = "the processor's own save, since training changed it"
    changes += tuple(Change(file=name, key="*", before="the base's file", after=note) for name in changed)
    return written.repairs, changes


def _verify(
    model: torch.nn.Module,
    processor: Any,
    staging: Path,
    base: Path | None,
    *,
    dtype: torch.dtype,
    requests: Sequence[Request],
) -> VerificationResult:
    inner = base_model(model)
    requests = list(requests)
    expected: list[Record] = []
    noise = 0.0
    if processor is not None:
        requests = [replace(request, with_rivals=True) for request in requests or [plain_request()]]
        expected, again = (policy_records(model, processor, requests, dtype=dtype) for _ in range(2))
        noise = policy_noise(expected, again)
    result = verify_export(
        staging,
        requests=requests,
        expected=expected,
        noise=noise,
        base=base,
        device=str(inner.device),
        attn_implementation=getattr(inner.config, "_attn_implementation", None),
    )
    if not result.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        raise VerificationError(f"not published, because the export failed verification: {failed}")
    return result


def _write_manifest(staging: Path, result: ExportResult) -> None:
    write_manifest(
        staging,
        {
            "base": None if result.base is None else result.base.name,  # the name alone: exports are uploaded
            "put_right": [asdict(repair) for repair in result.repairs],
            "changed_in_training": [str(change) for change in result.changes],
            "verification": None if result.verification is None else result.verification.to_json(),
        },
    )
