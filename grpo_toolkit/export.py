"""Publish a trained model as one folder that loads everywhere, says the same and decodes with its cache.

    gather the weights -> merge an adapter -> the base's own files -> verify in a fresh process -> publish

Everything happens in a staging folder beside the target; what fails on the way leaves nothing behind, and a folder
under the target's name has passed every check.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cache import base_model, is_sharded, random_state_kept
from grpo_toolkit.checkpoint import (
    MANIFEST,
    Checkpoint,
    check_output,
    dump_json,
    open_checkpoint,
    staged,
)
from grpo_toolkit.defaults import Repair, with_cache_defaults
from grpo_toolkit.errors import InputError, UnsupportedError, VerificationError
from grpo_toolkit.inference import has_processor, load_model, load_processor
from grpo_toolkit.portable import Change, carried_files, config_changes, copy_files, differing_files, write_configs
from grpo_toolkit.saving import base_folder, capture_model_defaults, inference_defaults
from grpo_toolkit.verify import VerificationResult, plain_request, policy_records, verify_export

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, Trainer

    from grpo_toolkit.defaults import InferenceDefaults
    from grpo_toolkit.inference import Request

MANIFEST_VERSION: Final = 1
_SAFETENSORS_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_RECORDED_PACKAGES: Final = ("grpo-toolkit", "torch", "transformers", "trl", "peft", "safetensors")


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
    with random_state_kept():
        model, processor = _open_source(source, processing_class, device)
        refuse_sharded(model)
        origin = base_folder(model, None if base is None else os.fspath(base))
        if base is not None and origin is None:
            raise InputError(f"base {os.fspath(base)}: neither a model folder nor in the local Hub cache")
        processor = processor if processor is not None or origin is None else _processor_of(origin)
        with staged(target, overwrite=overwrite) as staging:
            dtype = _export_dtype(model, origin)
            merged, defaults = _write_weights(model, staging, origin, dtype=dtype, overrides=generation_overrides)
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


def refuse_sharded(model: torch.nn.Module) -> None:
    """Raise where this process holds only a part of the weights.

    Raises:
        UnsupportedError: FSDP or ZeRO-3.
    """
    if is_sharded(model):
        raise UnsupportedError(
            "the model is sharded over processes (FSDP or ZeRO-3), which a live export does not gather yet; save a "
            "full checkpoint with trainer.save_model() and export that folder"
        )


def _open_source(source: Any, processing_class: Any, device: str) -> tuple[torch.nn.Module, Any]:
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        model, processor, report = load_model(folder, device=device)
        if not report.is_clean:
            raise InputError(
                f"{folder}: its weights do not fit its config (missing {report.missing[:2]}, "
                f"unexpected {report.unexpected[:2]}, mismatched {report.mismatched[:2]}); nothing was exported"
            )
        return model, processing_class if processing_class is not None else processor
    if hasattr(source, "model") and hasattr(source, "processing_class"):
        return source.model, processing_class if processing_class is not None else source.processing_class
    return source, processing_class


def _processor_of(folder: Path) -> Any:
    return load_processor(folder) if has_processor(folder) else None


def _export_dtype(model: torch.nn.Module, base: Path | None) -> torch.dtype:
    """The dtype that most of the base's tensors are stored in; the model's own where there is no base.

    TRL loads a model given by name in float32 unless told otherwise: a bfloat16 base would come out twice its size.
    """
    import torch

    tensors = {} if base is None else open_checkpoint(base).tensors()
    stored = [info.dtype for info in tensors.values() if info.dtype in _SAFETENSORS_DTYPES]
    dtype: torch.dtype = base_model(model).dtype
    if stored:
        dtype = getattr(torch, _SAFETENSORS_DTYPES[max(set(stored), key=stored.count)])
    return dtype


def _write_weights(
    model: torch.nn.Module,
    staging: Path,
    base: Path | None,
    *,
    dtype: torch.dtype,
    overrides: Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, InferenceDefaults]:
    """Save the (merged) weights in the base's dtype; returns the model that was saved and its defaults."""
    defaults = capture_model_defaults(model, base=base, overrides=overrides)
    plain = _merged(model, base, dtype) if hasattr(model, "peft_config") else base_model(model)
    weights = _cast(plain.state_dict(), dtype)
    with inference_defaults(plain, defaults):
        # The class's own method: a save hook on the instance would do the same again, with other overrides.
        type(plain).save_pretrained(plain, staging, state_dict=weights)
    return plain, defaults


def _cast(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights on the CPU in `dtype`. Tied names go on sharing one tensor: saving finds ties by their storage."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in state_dict.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state_dict.items()}


def _merged(model: torch.nn.Module, base: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """A fresh copy of the base with the adapter merged in; the live model is left as it is."""
    from peft import PeftModel

    if base is None:
        name = getattr(base_model(model).config, "_name_or_path", None)
        raise UnsupportedError(
            f"an adapter is merged into its base from disk, and the base {name!r} is no folder here; pass base="
        )
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-adapter-") as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        fresh, _, _ = load_model(base)
        adapted = PeftModel.from_pretrained(fresh.float(), folder)
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged.to(dtype)


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
    changed = _write_processor(processor, base, staging)
    note = "the processor's own save, since training changed it"
    changes += tuple(Change(file=name, key="*", before="the base's file", after=note) for name in changed)
    return written.repairs, changes


def _write_processor(processor: Any, base: Path, staging: Path) -> list[str]:
    """Carry the base's tokenizer and processor files, unless training changed the processor; returns what changed.

    Whether it did is found by saving both with this library and comparing the files.
    """
    original = _processor_of(base)
    if processor is not None and original is not None:
        trained = _without_rollout_settings(processor, original)
        with tempfile.TemporaryDirectory(prefix="grpo-toolkit-processor-") as folder:
            left, right = Path(folder, "base"), Path(folder, "trained")
            original.save_pretrained(left)
            trained.save_pretrained(right)
            changed = differing_files(left, right)
            if changed:
                copy_files(sorted(right.iterdir()), staging)
                return changed
    elif processor is not None:
        processor.save_pretrained(staging)
        return ["(tokenizer and processor)"]
    copy_files(carried_files(base), staging)
    return []


def _without_rollout_settings(processor: Any, original: Any) -> Any:
    """A copy of the trained processor with the padding and truncation of the original.

    TRL pads and truncates on the left for its rollouts, and every padded batch leaves its settings in the tokenizer's
    backend, from where they would be saved into tokenizer.json.
    """
    copied = copy.deepcopy(processor)
    ours, theirs = (getattr(one, "tokenizer", one) for one in (copied, original))
    ours.padding_side, ours.truncation_side = theirs.padding_side, theirs.truncation_side
    for tokenizer in (ours, theirs):
        if hasattr(tokenizer, "backend_tokenizer"):
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
    return copied


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
    expected = []
    if processor is not None:
        requests = [replace(request, with_margins=True) for request in requests or [plain_request()]]
        expected = policy_records(model, processor, requests, dtype=dtype)
    result = verify_export(
        staging,
        requests=requests,
        expected=expected,
        base=base,
        device=str(inner.device),
        attn_implementation=getattr(inner.config, "_attn_implementation", None),
    )
    if not result.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        raise VerificationError(f"not published, because the export failed verification: {failed}")
    return result


def _write_manifest(staging: Path, result: ExportResult) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staging.iterdir())
        if path.is_file()
    }
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "versions": _versions(),
        "base": None if result.base is None else str(result.base),
        "put_right": [asdict(repair) for repair in result.repairs],
        "changed_in_training": [str(change) for change in result.changes],
        "verification": None if result.verification is None else result.verification.to_json(),
        "files": files,
    }
    (staging / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def manifest_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        CheckpointError: the folder is no model folder.
        InputError: it is one, but not an export of ours.
    """
    checkpoint: Checkpoint = open_checkpoint(path)
    manifest = checkpoint.json(MANIFEST)
    if not isinstance(manifest, dict):
        raise InputError(f"{checkpoint.path}: no {MANIFEST} in it, so it is not an export of this package")
    return manifest
