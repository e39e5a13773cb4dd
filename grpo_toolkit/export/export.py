"""Publish a trained model as one folder that loads everywhere, says the same and decodes with its cache.

    gather the weights -> merge an adapter -> the base's own files -> verify in a fresh process -> publish

Everything happens in a staging folder beside the target; what fails on the way leaves nothing behind, and a folder
under the target's name has passed every check.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.base_files import Change, config_changes, declare_dtype, write_configs
from grpo_toolkit.checkpoint.base_lookup import base_of_adapter, named_base
from grpo_toolkit.checkpoint.generation_defaults import Repair, with_cache_defaults
from grpo_toolkit.checkpoint.manifest import write_manifest
from grpo_toolkit.checkpoint.model_folder import Kind, open_checkpoint
from grpo_toolkit.checkpoint.publish import check_output, staged
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.shard_plan import named_dtype
from grpo_toolkit.doctor.compat import check_compat, write_older_forms
from grpo_toolkit.errors import CheckpointError, InputError, UnsupportedError, VerificationError
from grpo_toolkit.export.export_weights import (
    Storage,
    copied_shards,
    gather_weights,
    stored_dtypes,
    unloaded_model,
    write_weights,
)
from grpo_toolkit.export.format_reward import format_reward_of, scored_by
from grpo_toolkit.export.live_adapter import is_adapted, refuse_unmergeable
from grpo_toolkit.export.policy_answers import PolicyAnswers, ask_policy
from grpo_toolkit.export.verify import VerificationResult, verify_export
from grpo_toolkit.model.generation.request import logged_requests
from grpo_toolkit.model.live_model import base_model, random_state_kept
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.memory import why_too_large
from grpo_toolkit.model.processor_files import processor_of, write_processor
from grpo_toolkit.model.save_hook import base_folder, capture_model_defaults
from grpo_toolkit.model.sharding.gather import is_fsdp1, is_sharded
from grpo_toolkit.model.sharding.ranks import rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, Trainer

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress
    from grpo_toolkit.model.generation.request import Request


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A published export.

    Attributes:
        path: the folder.
        base: the folder of the base model whose files were carried, or None.
        repairs: values that were wrong in the base and are right in the export.
        changes: values that training changed and the export therefore carries.
        made_portable: what was changed in files that transformers 5 wrote, so that 4.x and servers can read them too.
        sources: what went in, by name: the source, and the base or adapter that it names.
        bytes: of all the files.
        verification: every check with its figure, or None where verification was switched off.
        seconds: how long it all took.
    """

    path: Path
    base: Path | None
    repairs: tuple[Repair, ...]
    changes: tuple[Change, ...]
    made_portable: tuple[str, ...]
    sources: Mapping[str, str]
    bytes: int
    verification: VerificationResult | None
    seconds: float


def export_model(
    source: Trainer | torch.nn.Module | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    requests: Sequence[Request] = (),
    format_reward: Callable[..., list[float]] | None = None,
    generation_overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    device: str = "cpu",
    link: bool = False,
    max_shard_size: str | int | None = None,
    dtype: str | None = None,
    compat: str = "all",
    progress: Progress | None = None,
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
        requests: prompts on which export and policy must give the same greedy tokens; of a trainer, a handful of the
            prompts that it has logged are replayed too.
        format_reward: a reward function, as trainers call it, which has to value the export's answers as the policy's;
            by default a trainer's own whose name has "format" in it.
        generation_overrides: keys for `generation_config.json` that win over the base's.
        overwrite: replace an earlier export in `output_dir`.
        verify: reload the result in a fresh process and check it before publishing.
        device: where a folder is loaded; a live model stays where it is, and is verified there.
        link: for a folder whose weight files are as its base's: hard links in place of copies, where the file system
            has them. What edits one of the two in place then edits both.
        max_shard_size: largest weight file, such as "5GB"; by default a folder's (or the base's) own files.
        dtype: of every floating-point tensor ("float16"); by default the base's.
        compat: "all": an export loads wherever its model type does, also where its base does not, because only
            transformers 5 can read the base's files; "v5": in the base's forms alone.
        progress: called with the bytes of weights that are written and the bytes in all; not for a live model that is
            saved whole.
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
    check_compat(compat)
    storage = Storage(
        dtype=None if dtype is None else named_dtype(dtype),
        compat=compat,
        max_shard_size=max_shard_size,
        link=link,
        progress=progress,
    )
    named = None if base is None else named_base(base)
    with random_state_kept():
        folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
        copied = () if folder is None else copied_shards(folder, named or folder, storage)
        is_streamed = folder is not None and (bool(copied) or open_checkpoint(folder).kind is Kind.ADAPTER)
        is_loaded = not is_streamed or (verify and not _is_too_large(folder, named, device))
        if folder is not None and not is_loaded:
            model, processor = _open_unloaded(folder, processing_class, named)
        else:
            model, processor = _open_source(source, processing_class, device, named)
        refuse_unsupported(model)
        origin = named or base_folder(model)
        processor = processor if processor is not None or origin is None else processor_of(origin)
        stored = {} if origin is None else stored_dtypes(origin, storage)
        stored_as = _export_dtype(model, stored, storage)
        defaults = capture_model_defaults(model, base=origin, overrides=generation_overrides)
        answers = PolicyAnswers(requests=tuple(requests), records=(), noise=0.0) if verify else None
        if verify and is_loaded:
            asked = [*requests, *logged_requests(source)]
            answers = ask_policy(model, processor, asked, dtype=stored_as, defaults=defaults)
        reward = format_reward or format_reward_of(source)
        scores = {} if reward is None or processor is None else {"format reward": scored_by(reward, processor)}
        weights = gather_weights(model, dtype=stored_as, stored=stored) if folder is None else None
        if rank() != 0:
            return None
        with staged(target, overwrite=overwrite) as staging:
            write_weights(
                model,
                weights,
                staging,
                origin,
                folder=folder,
                copied=copied,
                stored=stored,
                dtype=stored_as,
                defaults=defaults,
                storage=storage,
            )
            repairs, changes = _write_files(base_model(model), processor, staging, origin, defaults)
            if storage.dtype is not None:
                declare_dtype(staging, FLOAT_NAMES[storage.dtype])
            made_portable = write_older_forms(staging) if compat == "all" else ()
            verification = (
                None
                if answers is None
                else _verify(
                    staging,
                    answers,
                    scores=scores,
                    base=origin,
                    dtype=None if storage.dtype is None else FLOAT_NAMES[storage.dtype],
                    device=device if folder is not None else str(base_model(model).device),
                    attn_implementation=getattr(base_model(model).config, "_attn_implementation", None),
                )
            )
            result = ExportResult(
                path=target,
                base=origin,
                repairs=repairs,
                changes=changes,
                made_portable=made_portable,
                sources=_sources(source, model, origin),
                bytes=sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()),
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


def _is_too_large(folder: Path | None, base: Path | None, device: str) -> bool:
    """Whether there is no memory to load a folder's model, or an adapter's base: it is then exported unasked."""
    if folder is None:
        return False
    if open_checkpoint(folder).kind is Kind.ADAPTER:
        folder = base or base_of_adapter(folder)
    return why_too_large(open_checkpoint(folder), device) is not None


def _open_unloaded(folder: Path, processing_class: Any, base: Path | None) -> tuple[torch.nn.Module, Any]:
    """A folder's model without its weights: what is not verified is copied or merged from file to file."""
    with _named_if_unloadable(folder):
        model = unloaded_model(folder, base=base)
        return model, processing_class if processing_class is not None else processor_of(folder)


def _open_source(source: Any, processing_class: Any, device: str, base: Path | None) -> tuple[torch.nn.Module, Any]:
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        open_checkpoint(folder).tensors()  # a header that is damaged or cut off is named before anything is loaded
        with _named_if_unloadable(folder):
            model, processor, report = load_model(folder, device=device, base=base)
        if not report.is_clean:
            raise InputError(
                f"{folder}: its weights do not fit its config (missing {report.missing[:2]}, "
                f"unexpected {report.unexpected[:2]}, mismatched {report.mismatched[:2]}); nothing was exported"
            )
        return model, processing_class if processing_class is not None else processor
    if hasattr(source, "model") and hasattr(source, "processing_class"):
        return source.model, processing_class if processing_class is not None else source.processing_class
    return source, processing_class


@contextmanager
def _named_if_unloadable(folder: Path) -> Iterator[None]:
    """What the libraries raise about a folder becomes one error that names it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: cannot be loaded ({type(error).__name__}: {reason})") from error


def _export_dtype(model: torch.nn.Module, stored: Mapping[str, str], storage: Storage) -> torch.dtype:
    """The dtype that was asked for, else the one that most tensors are `stored` in, else (no base) the model's own.

    TRL loads a model given by name in float32 unless told otherwise: a bfloat16 base would come out twice its size.
    """
    import torch

    dtypes = list(stored.values()) if storage.dtype is None else [FLOAT_NAMES[storage.dtype]]
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
    changes += tuple(Change(file=name) for name in changed)
    return written.repairs, changes


def _verify(staging: Path, answers: PolicyAnswers, **options: Any) -> VerificationResult:
    result = verify_export(
        staging,
        requests=answers.requests,
        expected=answers.records,
        noise=answers.noise,
        logit_noise=answers.logit_noise,
        **options,
    )
    if not result.passed:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in result.failures)
        raise VerificationError(f"not published, because the export failed verification: {failed}")
    return result


def _sources(source: Any, model: torch.nn.Module, base: Path | None) -> dict[str, str]:
    """What an export is made of, for its table."""
    if isinstance(source, (str, os.PathLike)):
        kind = "adapter" if open_checkpoint(source).kind is Kind.ADAPTER else "model"
        named = f"{kind} {os.fspath(source)}"
    else:
        kind = "adapter" if is_adapted(model) else "model"
        named = f"live {kind} ({type(base_model(model)).__name__}, {str(base_model(model).dtype)[6:]})"
    return {"source": named, "base": "none on disk" if base is None else str(base)}


def _write_manifest(staging: Path, result: ExportResult, notes: Mapping[str, Any]) -> None:
    write_manifest(
        staging,
        {
            "base": None if result.base is None else result.base.name,  # the name alone: exports are uploaded
            "put_right": [asdict(repair) for repair in result.repairs],
            "changed_in_training": [str(change) for change in result.changes],
            "made_portable": list(result.made_portable),
            "verification": None if result.verification is None else result.verification.to_json(),
            **notes,
        },
        sums=result.verification is not None,
    )
