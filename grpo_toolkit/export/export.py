"""Publish a trained model as one folder that loads everywhere, says the same and decodes with its cache.

    gather the weights -> merge an adapter -> the base's own files -> verify in a fresh process -> publish

Everything happens in a staging folder beside the target; what fails on the way leaves nothing behind, and a folder
under the target's name has passed every check. One that is whole and failed a check is kept as `<target>.rejected`,
with the report in its manifest: hours of training went into it.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.base_files import Change, declare_dtype, write_configs
from grpo_toolkit.checkpoint.folders.base_lookup import named_base
from grpo_toolkit.checkpoint.publish import check_output, staged
from grpo_toolkit.checkpoint.weights.shard_plan import named_dtype
from grpo_toolkit.doctor.compat import check_compat, write_older_forms
from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.export.export_plan import ExportPlan, Storage, plan_export
from grpo_toolkit.export.export_result import NONE, ExportResult, refuse_failed, write_report
from grpo_toolkit.export.export_weights import gather_weights, write_weights
from grpo_toolkit.export.format_reward import format_reward_of, format_scores
from grpo_toolkit.export.fp8.publish import publish_fp8
from grpo_toolkit.export.policy_answers import PolicyAnswers, ask_policy
from grpo_toolkit.export.policy_weights import is_quantised
from grpo_toolkit.export.quantised_policy import ask_unquantised
from grpo_toolkit.export.shards.model_folder import as_model_folder
from grpo_toolkit.export.verify import VerificationResult, verify_export
from grpo_toolkit.merge.adapter import find_adapter
from grpo_toolkit.model.generation.request import logged_requests
from grpo_toolkit.model.live_model import is_tied, random_state_kept
from grpo_toolkit.model.saving.portable_files import trained_changes
from grpo_toolkit.model.saving.processor_files import save_plainly, write_processor
from grpo_toolkit.model.sharding.gather import is_sharded
from grpo_toolkit.model.sharding.ranks import rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from transformers import Trainer

    from grpo_toolkit.checkpoint.generation_defaults import Repair
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress
    from grpo_toolkit.export.format_reward import Score
    from grpo_toolkit.model.generation.request import Request


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
    adapter_name: str | None = None,
    format: str | None = None,
    prompts: Sequence[Mapping[str, Any]] = (),
    reward_funcs: Sequence[Callable[..., list[float]]] = (),
    accept_loss: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> ExportResult | None:
    """Export a trained model for inference.

    Under several processes call it on every rank, as `trainer.save_model()`: the ranks gather a sharded model (FSDP2,
    ZeRO-3) and ask it together, rank 0 publishes.

    Args:
        source: a trainer, a model (PEFT-wrapped or not), or a folder with a full model, a LoRA adapter or the
            shards of verl's family or of accelerate's FSDP.
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
        adapter_name: which adapter of a folder that holds several.
        format: "fp8": publish the export in FP8 (compressed-tensors, dynamic), held against the export itself. A
            source that is a verified export is quantised as it is; of any other the export is made first, in a
            scratch folder beside `output_dir`.
        prompts: for FP8, held-out rows as trainers take them (`prompt`, `image`, other columns), at most 64; by
            default made-up questions and drawn pictures.
        reward_funcs: for FP8, reward functions, as trainers call them, which have to pay the answers to `prompts` what
            they pay the export's.
        accept_loss: publish FP8 that is further from its export than the tolerance, with the figure in the manifest.
        finish: called with the complete folder before it gets its name; what it writes is published with it.

    Returns:
        What was published; None on ranks other than 0.

    Raises:
        OutputExistsError: `output_dir` is there and may not be replaced.
        CheckpointError: `source` or `base` is a folder that holds no model.
        UnsupportedError: the model is wrapped by FSDP1, or its adapter cannot be merged; the message says what to do.
        VerificationError: a check failed; nothing was published, and the candidate is in `<output_dir>.rejected`.
        WorkerError: the export cannot be loaded, which is kept in the same way.
    """
    exported = partial(
        _export,
        source,
        base=None if base is None else named_base(base),
        processing_class=processing_class,
        requests=requests,
        format_reward=format_reward,
        generation_overrides=generation_overrides,
        verify=verify,
        device=device,
        dtype=dtype,
        compat=compat,
        adapter_name=adapter_name,
        rejected_as=Path(output_dir),
    )
    if format is None:
        return exported(
            Path(output_dir),
            overwrite=overwrite,
            link=link,
            max_shard_size=max_shard_size,
            progress=progress,
            notes=notes,
            finish=finish,
        )
    if format != "fp8":
        raise InputError(f"format {format!r}: not one of fp8; leave it out for the export as it is")
    return publish_fp8(
        source,
        Path(output_dir),
        exported,
        is_taken_as_it_is=dtype is None and base is None and not generation_overrides and adapter_name is None,
        requests=requests,
        prompts=prompts,
        reward_funcs=reward_funcs,
        accept_loss=accept_loss,
        verify=verify,
        device=device,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        progress=progress,
        notes=notes,
        finish=finish,
    )


def _export(
    source: Any,
    target: Path,
    *,
    base: Path | None,
    processing_class: Any,
    requests: Sequence[Request],
    format_reward: Callable[..., list[float]] | None,
    generation_overrides: Mapping[str, Any] | None,
    verify: bool,
    device: str,
    dtype: str | None,
    compat: str,
    adapter_name: str | None,
    rejected_as: Path,
    overwrite: bool = False,
    link: bool = False,
    max_shard_size: str | int | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> ExportResult | None:
    """Make the export in its base's dtypes; what fails is kept beside the folder `rejected_as`."""
    if rank() != 0 and not _takes_all_ranks(source):
        return None
    started = time.monotonic()
    check_output(target, overwrite=overwrite)
    check_compat(compat)
    storage = Storage(
        dtype=None if dtype is None else named_dtype(dtype),
        compat=compat,
        max_shard_size=max_shard_size,
        link=link,
        progress=progress,
    )
    with random_state_kept(), _opened(source, target, base, adapter_name) as opened:
        plan = plan_export(
            opened,
            storage,
            base=base,
            processing_class=processing_class,
            overrides=generation_overrides,
            device=device,
            load=verify,
        )
        answers = _ask(plan, requests, logged_requests(source)) if verify else None
        scores = format_scores(format_reward or format_reward_of(source), plan.source.processor)
        weights = gather_weights(plan)
        if rank() != 0:
            return None
        with staged(target, overwrite=overwrite) as staging:
            write_weights(plan, weights, staging)
            repairs, changes, made_portable = _write_files(plan, staging)
            verification = None if answers is None else _verify(plan, staging, answers, scores)
            result = ExportResult(
                path=target,
                base=plan.known_base,
                repairs=repairs,
                changes=changes,
                made_portable=made_portable,
                sources=_sources(plan, source, opened),
                verification=verification if isinstance(verification, VerificationResult) else None,
                bytes=sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()),
                seconds=time.monotonic() - started,
            )
            write_report(staging, result, verification, notes or {})
            refuse_failed(staging, rejected_as, verification)
            if finish is not None:
                finish(staging)
    return result


@contextmanager
def _opened(source: Any, target: Path, base: Path | None, adapter_name: str | None) -> Iterator[Any]:
    """Yield what is exported: of a folder one of its adapters, or a model folder made of a trainer's shards."""
    if not isinstance(source, (str, os.PathLike)):
        yield source
        return
    folder = Path(source) if adapter_name is None else find_adapter(source, adapter_name)
    with as_model_folder(folder, beside=target, base=base) as model:
        yield model


def _sources(plan: ExportPlan, source: Any, opened: Any) -> dict[str, str]:
    """Return what went in, by name; shards by the folder that was named, not by the one that was made of them."""
    said = str(plan.source)
    if plan.source.folder is not None and opened != Path(source):
        said = f"shards {source}" if not Path(opened).is_relative_to(source) else said
    return {"source": said, "base": str(plan.known_base or NONE)}


def _takes_all_ranks(source: Any) -> bool:
    model = getattr(source, "model", source) if hasattr(source, "processing_class") else source
    return hasattr(model, "parameters") and is_sharded(model)


def _ask(plan: ExportPlan, requests: Sequence[Request], logged: Sequence[Request]) -> PolicyAnswers:
    """Ask the trained model what the export will be asked; a model that was not loaded has no answers."""
    source = plan.source
    if not source.is_loaded:
        return PolicyAnswers(requests=tuple(requests), records=(), noise=0.0)
    asked = [*requests, *logged]
    if source.is_adapter and source.base is not None and is_quantised(source.model) and not is_sharded(source.model):
        return ask_unquantised(plan, source.base, asked)
    return ask_policy(source.model, source.processor, asked, dtype=plan.dtype, defaults=plan.defaults)


def _write_files(plan: ExportPlan, staging: Path) -> tuple[tuple[Repair, ...], tuple[Change, ...], tuple[str, ...]]:
    """Lay the base's own files over what the library saved.

    Returns:
        What was put right, what training changed, and what was rewritten for older readers.
    """
    model, processor, defaults = plan.source.plain, plan.source.processor, plan.defaults
    repairs = defaults.repairs
    changes: tuple[Change, ...] = ()
    if plan.base_folder is not None:
        changes = trained_changes(model, plan.base_folder, defaults)
        repairs = write_configs(plan.base_folder, staging, changes=changes, overrides=defaults.overrides).repairs
        changes += tuple(Change(file=name) for name in write_processor(processor, plan.base_folder, staging))
    elif processor is not None:
        save_plainly(processor, staging)
    if plan.storage.dtype_name is not None:
        declare_dtype(staging, plan.storage.dtype_name)
    return repairs, changes, write_older_forms(staging) if plan.storage.compat == "all" else ()


def _verify(
    plan: ExportPlan, staging: Path, answers: PolicyAnswers, scores: Mapping[str, Score]
) -> VerificationResult | WorkerError:
    """Check the staged export in a fresh process, against what the trained model answered.

    Returns:
        Every check, or why the export cannot be loaded.
    """
    try:
        return verify_export(
            staging,
            requests=answers.requests,
            expected=answers.records,
            noise=answers.noise,
            logit_noise=answers.logit_noise,
            distance=answers.distance,
            scores=scores,
            base=plan.source.base,
            tied=None if is_sharded(plan.source.model) else is_tied(plan.source.model),
            dtype=plan.storage.dtype_name,
            # A folder's template may have been lost after its training; a live policy's is the one it trained with.
            sees=answers.sees or plan.source.folder is not None,
            device=answers.device or plan.source.device,
            attn_implementation=getattr(plan.source.plain.config, "_attn_implementation", None),
        )
    except WorkerError as error:
        return error
