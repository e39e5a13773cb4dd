"""The callbacks: thin, with no policy of their own.

Order matters only in that `LatencyCallback` comes after `ExportCallback`, as in the README. All of them keep the
rule that training is sacred: they do not change a loss by a bit, raise into the trainer, or run a collective on one
rank. What fails is reported once and training goes on; `strict=True` raises it when training has ended.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from transformers import TrainerCallback

from grpo_toolkit.cache import (
    base_model,
    disable_cache_for_training,
    enable_cache_for_generation,
    is_checkpointing,
    is_sharded,
    leave_training,
    set_cache_flags,
)
from grpo_toolkit.checkpoint import check_output
from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.export import ExportResult, export_model, refuse_sharded
from grpo_toolkit.latency.measure import Arm, LatencyRow, measure_latency
from grpo_toolkit.latency.store import FILE_NAME, append_rows
from grpo_toolkit.latency.workload import requests_from_rows
from grpo_toolkit.resume import TRAINER_STATE, ResumeReport, ensure_checkpoint_weights
from grpo_toolkit.saving import (
    base_folder,
    capture_model_defaults,
    install_save_hook,
    remember_plain_state,
    save_as_plain_trainer,
)
from grpo_toolkit.tracking.console import export_table, latency_table, say, wandb_hint
from grpo_toolkit.tracking.wandb import log_latency, prepare_environment, run_folder
from grpo_toolkit.verify import plain_request

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.defaults import InferenceDefaults
    from grpo_toolkit.inference import Request

logger = logging.getLogger(__name__)

ARMS: Final = ("base", "checkpoint", "export", "export_no_cache")

_exports: WeakKeyDictionary[torch.nn.Module, ExportResult] = WeakKeyDictionary()
"""What `ExportCallback` published of each trained model, for the callbacks after it."""


class _GuardedCallback(TrainerCallback):  # type: ignore[misc]
    """Reports a failure once instead of raising it into the trainer; with `strict`, raises it at the end."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.failures: list[str] = []
        self._first_error: Exception | None = None

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the one place where anything may be caught: training must go on
            message = f"{what} failed: {type(error).__name__}: {error}"
            if message not in self.failures:
                self.failures.append(message)
                logger.error("grpo_toolkit: %s", message, exc_info=not isinstance(error, GrpoToolkitError))
            self._first_error = self._first_error or error

    def _raise_if_strict(self) -> None:
        if self.strict and self._first_error is not None:
            raise self._first_error


class KVCacheCallback(_GuardedCallback):
    """Keeps the KV cache where it belongs: off in the training forward, on in rollouts, on in every saved file.

    Args:
        generation_overrides: keys for `generation_config.json` in every save that win over the base's.
        strict: raise at the end of training if a promise could not be kept.
    """

    def __init__(self, *, generation_overrides: Mapping[str, Any] | None = None, strict: bool = False) -> None:
        super().__init__(strict=strict)
        self.generation_overrides = generation_overrides
        self.defaults: InferenceDefaults | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Capture the base's defaults and hook the saves, before `Trainer.__init__` sets `use_cache` to False."""
        with self._guarded("hooking the saves"):
            self._attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        with self._guarded("hooking the saves"):
            if self.defaults is None:  # added with trainer.add_callback(), after on_init_end
                self._attach(model)
        with self._guarded("setting the cache for training"):
            remember_plain_state(model)
            if is_checkpointing(model):
                disable_cache_for_training(model)
            if enable_cache_for_generation(model) and state.is_world_process_zero:
                logger.warning(
                    "grpo_toolkit: this base was saved with use_cache=false in generation_config.json (%s); rollouts "
                    "would have run without a cache. It is on now, and will be in every save",
                    "none on disk" if self.defaults is None else self.defaults.source,
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as its user expects it: configs as the base had them, eval mode, no checkpointing."""
        model = kwargs["model"]
        with self._guarded("putting the cache back"):
            if self.defaults is not None:
                set_cache_flags(base_model(model).config, dict.fromkeys(self.defaults.cache_levels, True))
            leave_training(model)
        self._raise_if_strict()

    def _attach(self, model: torch.nn.Module) -> None:
        self.defaults = capture_model_defaults(model, overrides=self.generation_overrides)
        install_save_hook(model, self.defaults)


class ResumeGuardCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a resumed training go on from its checkpoint's weights, and proves that it does.

    On a resume the live weights are held against the checkpoint's, tensor by tensor; those that the trainer could
    not match are loaded before the first step. `load_best_model_at_end` is checked the same way. Sharded models (FSDP,
    ZeRO-3) are left to their own loaders, which do not have the fault.

    Args:
        checkpoint: the folder that is resumed from, if it is not in `output_dir`.

    Raises:
        ResumeError: from `train()`, before its first step, if the weights cannot be made the checkpoint's: training
            on from other weights would be worse than stopping.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.report: ResumeReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            return
        folder = self._resumed_from(args, state.global_step)
        if folder is not None:
            self._ensure(kwargs["model"], folder, state)
        elif state.is_world_process_zero:
            logger.warning(
                "grpo_toolkit: resumed at step %d, but no checkpoint-%d in %s to compare with; name it: "
                "ResumeGuardCallback(checkpoint=...)",
                state.global_step,
                state.global_step,
                args.output_dir,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._ensure(kwargs["model"], Path(best), state)

    def _ensure(self, model: torch.nn.Module, folder: Path, state: TrainerState) -> None:
        if is_sharded(model):
            return
        self.report = ensure_checkpoint_weights(model, folder)
        if state.is_world_process_zero:
            logger.log(logging.WARNING if self.report.restored else logging.INFO, "grpo_toolkit: %s", self.report)

    def _resumed_from(self, args: TrainingArguments, step: int) -> Path | None:
        named = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        candidates = [self.checkpoint, named and Path(named), Path(args.output_dir, f"checkpoint-{step}")]
        return next((folder for folder in candidates if folder and (folder / TRAINER_STATE).is_file()), None)


class ExportCallback(_GuardedCallback):
    """Exports the trained model at the end of training: merged, verified, published atomically.

    Args:
        output_dir: the folder to publish.
        base: the base model's folder or Hub name; by default what the model was loaded from.
        prompts: dataset rows (`prompt`, `image` or `images`) on which export and policy must give the same greedy
            tokens; by default the first rows of the evaluation dataset, or of the training dataset.
        num_prompts: how many of them.
        generation_overrides: keys for `generation_config.json` that win over the base's.
        overwrite: replace an earlier export in `output_dir`.
        strict: raise at the end of training if the export failed.

    Raises:
        OutputExistsError: at once, if `output_dir` is there and may not be replaced.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        prompts: Iterable[Mapping[str, Any]] | None = None,
        num_prompts: int = 4,
        generation_overrides: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        self.output_dir = Path(output_dir)
        self.base = base
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.generation_overrides = generation_overrides
        self.overwrite = overwrite
        self.result: ExportResult | None = None
        check_output(self.output_dir, overwrite=overwrite)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say before training, not after it, if the model is one that cannot be exported."""
        with self._guarded("the export after this training"):
            refuse_sharded(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if state.is_world_process_zero:
            with self._guarded("the export"):
                self.result = export_model(
                    model,
                    self.output_dir,
                    base=self.base,
                    processing_class=kwargs.get("processing_class"),
                    requests=_requests(self.prompts, kwargs, limit=self.num_prompts),
                    generation_overrides=self.generation_overrides,
                    overwrite=self.overwrite,
                )
                _exports[base_model(model)] = self.result
                say(export_table(self.result))
        self._raise_if_strict()


class LatencyCallback(_GuardedCallback):
    """Measures base, plain checkpoint and export at the end of training, in processes of their own.

    The arms: `base` as it was loaded; `checkpoint` as a plain trainer would have saved it (for LoRA: the adapter,
    unmerged, on its base); `export`; and `export_no_cache`, the export with its KV cache switched off, which shows
    what the cache is worth. Rows go to `<output_dir>/latency/latency.jsonl`, then into the W&B run that the trainer
    opened.

    Args:
        arms: which of them, in this order.
        new_tokens: tokens generated per request.
        rounds: measured requests per arm; all arms take turns.
        prompts: dataset rows to ask; by default the first of the evaluation or training dataset.
        num_prompts: how many of them.
        output_dir: where to put the results; by default `latency` in the trainer's `output_dir`.
        strict: raise at the end of training if the measurement failed.
    """

    def __init__(
        self,
        *,
        arms: Sequence[str] = ARMS,
        new_tokens: int = 64,
        rounds: int = 6,
        prompts: Iterable[Mapping[str, Any]] | None = None,
        num_prompts: int = 4,
        output_dir: str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arms {unknown}; choose from {list(ARMS)}")
        self.arms = tuple(arms)
        self.new_tokens = new_tokens
        self.rounds = rounds
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.output_dir = output_dir
        self.rows: list[LatencyRow] = []

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before W&B starts: its files into `output_dir`, offline without a key; a user's `WANDB_*` wins."""
        with self._guarded("preparing W&B"):
            if "wandb" in args.report_to and args.should_log:
                prepare_environment(args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            with self._guarded("the latency measurement"):
                self._measure(args, state, kwargs)
        self._raise_if_strict()

    def _measure(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        from dataclasses import replace

        from grpo_toolkit.tracking.plots import latency_chart

        model = kwargs["model"]
        folder = Path(self.output_dir) if self.output_dir is not None else Path(args.output_dir, "latency")
        folder.mkdir(parents=True, exist_ok=True)
        inner = base_model(model)
        requests = _requests(self.prompts, kwargs, limit=self.num_prompts)
        with tempfile.TemporaryDirectory(prefix=".plain-checkpoint-", dir=folder) as plain:
            arms = self._find_arms(model, Path(plain), kwargs.get("processing_class"))
            rows = measure_latency(
                arms,
                requests or [plain_request()],
                new_tokens=self.new_tokens,
                rounds=self.rounds,
                device=str(inner.device),
                attn_implementation=getattr(inner.config, "_attn_implementation", None),
            )
        self.rows = [replace(row, step=state.global_step) for row in rows]
        append_rows(folder / FILE_NAME, self.rows)
        chart = latency_chart(self.rows, folder / "latency.png")
        say(latency_table(self.rows))
        say(f"rows: {folder / FILE_NAME}   chart: {chart}")
        if log_latency(self.rows, step=state.global_step):
            say(wandb_hint(*run_folder()))

    def _find_arms(self, model: torch.nn.Module, plain: Path, processing_class: Any) -> list[Arm]:
        export = _exports.get(base_model(model))
        base = export.base if export is not None else base_folder(model)
        if "checkpoint" in self.arms:
            save_as_plain_trainer(model, plain, processing_class)
        folders = {
            "base": base,
            "checkpoint": plain,
            "export": None if export is None else export.path,
            "export_no_cache": None if export is None else export.path,
        }
        missing = [arm for arm in self.arms if folders[arm] is None]
        if missing:
            logger.warning("grpo_toolkit: nothing to measure for %s (no such folder in this run)", ", ".join(missing))
        return [
            Arm(name=arm, path=path, use_cache=False if arm == "export_no_cache" else None)
            for arm in self.arms
            if (path := folders[arm]) is not None
        ]


def _requests(prompts: Iterable[Mapping[str, Any]] | None, kwargs: Mapping[str, Any], *, limit: int) -> list[Request]:
    """The prompts given, or the first rows of the trainer's own datasets; none where those cannot be indexed.

    Datasets are read by index, past the samplers: iterating a trainer's dataloader would move its random state.
    """
    if prompts is not None:
        return requests_from_rows(prompts, limit=limit)
    for name in ("eval_dataloader", "train_dataloader"):
        dataset: Any = getattr(kwargs.get(name), "dataset", None)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) and "prompt" in dataset[0]:
            return requests_from_rows((dataset[i] for i in range(min(limit, len(dataset)))), limit=limit)
    return []
