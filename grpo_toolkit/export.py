"""Publish a trained model as one folder that loads everywhere, says the same and decodes with its cache.

    gather the weights -> merge an adapter -> the base's own files -> verify in a fresh process -> publish

Everything happens in a staging folder beside the target; what fails on the way leaves nothing behind, and a folder
under the target's name has passed every check.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cache import base_model, random_state_kept
from grpo_toolkit.checkpoint import check_output, find_base, open_checkpoint, staged
from grpo_toolkit.defaults import Repair, with_cache_defaults
from grpo_toolkit.distributed import is_fsdp1, is_sharded, rank
from grpo_toolkit.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from grpo_toolkit.inference import load_model
from grpo_toolkit.manifest import write_manifest
from grpo_toolkit.merge.live import refuse_unmergeable
from grpo_toolkit.portable import Change, config_changes, write_configs
from grpo_toolkit.processing import processor_of, write_processor
from grpo_toolkit.saving import base_folder, capture_model_defaults
from grpo_toolkit.verify import PolicyAnswers, VerificationResult, ask_policy, verify_export
from grpo_toolkit.weights import gather_weights, needs_loading, stored_dtypes, unloaded_model, write_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, Trainer

    from grpo_toolkit.defaults import InferenceDefaults
    from grpo_toolkit.inference import Request


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
    link: bool = False,
    max_shard_size: str | int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> ExportResult | None:
    """Export a trained model for inference.

    Under several processes call it on every rank, as `trainer.save_model()`: the ranks gather a sharded model (FSDP2,
    ZeRO-3) and ask it together, rank 0 publishes.

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
        link: for a folder whose weight files are as its base's: hard links in place of copies, where the file system
            has them. What edits one of the two in place then edits both.
        max_shard_size: largest weight file, such as "5GB"; by default a folder's (or the base's) own files.
        notes: further facts for the manifest.

    Returns:
        What was published; None on ranks other than 0.

    Raises:
        OutputExistsError: `output_dir` is there and may not be replaced.
        CheckpointError: `source` or `base` is a folder that holds no model.
        UnsupportedError: the model is wrapped by FSDP1, or its adapter cannot be merged; the message says what to do.
        VerificationError: a check failed; nothing was published.
    """
    if rank() != 0 and not _takes_all_ranks(source):
        return None
    started = time.monotonic()
    target = Path(output_dir)
    check_output(target, overwrite=overwrite)
    named_base = None if base is None else find_base(os.fspath(base))
    if base is not None and named_base is None:
        raise InputError(f"base {os.fspath(base)}: neither a model folder nor in the local Hub cache")
    with random_state_kept():
        folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
        if folder is not None and not verify and not needs_loading(folder, named_base or folder):
            model, processor = _open_unloaded(folder, processing_class, named_base)
        else:
            model, processor = _open_source(source, processing_class, device, named_base)
        refuse_unsupported(model)
        origin = named_base or base_folder(model)
        processor = processor if processor is not None or origin is None else processor_of(origin)
        stored = {} if origin is None else stored_dtypes(origin)
        dtype = _export_dtype(model, stored)
        defaults = capture_model_defaults(model, base=origin, overrides=generation_overrides)
        answers = ask_policy(model, processor, requests, dtype=dtype, defaults=defaults) if verify else None
        weights = gather_weights(model, dtype=dtype, stored=stored) if folder is None else None
        if rank() != 0:
            return None
        with staged(target, overwrite=overwrite) as staging:
            write_weights(
                model,
                weights,
                staging,
                origin,
                folder=folder,
                dtype=dtype,
                defaults=defaults,
                link=link,
                max_shard_size=max_shard_size,
            )
            repairs, changes = _write_files(base_model(model), processor, staging, origin, defaults)
            verification = None if answers is None else _verify(model, staging, origin, answers)
            result = ExportResult(
                path=target,
                base=origin,
                repairs=repairs,
                changes=changes,
                verification=verification,
                seconds=time.monotonic() - started,
            )
            _write_manifest(staging, result, notes or {})
    return result


def refuse_unsupported(model: torch.nn.Module) -> None:
    """Raise for models that cannot be exported; the callback asks before training.

    Raises:
        UnsupportedError: FSDP1, or an adapter that cannot be merged.
    """
    if is_fsdp1(model):
        raise UnsupportedError(
            "the model is wrapped by FSDP1, which cannot be exported live; set `fsdp_version: 2` in the accelerate "
            "config, or save a full checkpoint with trainer.save_model() and export that folder"
        )
    refuse_unmergeable(model)


def _takes_all_ranks(source: Any) -> bool:
    model = getattr(source, "model", source) if hasattr(source, "processing_class") else source
    return hasattr(model, "parameters") and is_sharded(model)


def _open_unloaded(folder: Path, processing_class: Any, base: Path | None) -> tuple[torch.nn.Module, Any]:
    """A folder's model without its weights: what is not verified is copied or merged from file to file."""
    try:
        model = unloaded_model(folder, base=base)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {reason})") from error
    return model, processing_class if processing_class is not None else processor_of(folder)


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


def _export_dtype(model: torch.nn.Module, stored: Mapping[str, str]) -> torch.dtype:
    """The dtype that most of the base's tensors are `stored` in; the model's own where there is no base.

    TRL loads a model given by name in float32 unless told otherwise: a bfloat16 base would come out twice its size.
    """
    import torch

    dtypes = list(stored.values())
    dtype: torch.dtype = base_model(model).dtype
    return getattr(torch, max(set(dtypes), key=dtypes.count)) if dtypes else dtype


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


def _verify(model: torch.nn.Module, staging: Path, base: Path | None, answers: PolicyAnswers) -> VerificationResult:
    inner = base_model(model)
    result = verify_export(
        staging,
        requests=answers.requests,
        expected=answers.records,
        noise=answers.noise,
        base=base,
        device=str(inner.device),
        attn_implementation=getattr(inner.config, "_attn_implementation", None),
    )
    if not result.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        raise VerificationError(f"not published, because the export failed verification: {failed}")
    return result


def _write_manifest(staging: Path, result: ExportResult, notes: Mapping[str, Any]) -> None:
    write_manifest(
        staging,
        {
            "base": None if result.base is None else result.base.name,  # the name alone: exports are uploaded
            "put_right": [asdict(repair) for repair in result.repairs],
            "changed_in_training": [str(change) for change in result.changes],
            "verification": None if result.verification is None else result.verification.to_json(),
            **notes,
        },
        sums=result.verification is not None,
    )
