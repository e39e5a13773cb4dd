"""The callback that times base, checkpoint and export."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cache import base_model
from grpo_toolkit.callbacks.export import published
from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.callbacks.prompts import find_requests
from grpo_toolkit.distributed import gather, is_sharded
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.measure import Arm, measure_latency
from grpo_toolkit.latency.review import FOLDER_NAME, Review, load_review
from grpo_toolkit.latency.store import FILE_NAME, append_rows
from grpo_toolkit.saving import base_folder, save_as_plain_trainer, saved_state
from grpo_toolkit.tracking.charts.gallery import write_pictures
from grpo_toolkit.tracking.console import latency_table, say
from grpo_toolkit.tracking.findings import diagnose_arms, write_findings
from grpo_toolkit.tracking.mirror import Mirror
from grpo_toolkit.tracking.model_card import CARD, Training, write_model_card
from grpo_toolkit.tracking.report import write_report
from grpo_toolkit.tracking.wandb import Pages
from grpo_toolkit.verify import plain_request

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.latency.row import LatencyRow

logger = logging.getLogger(__name__)

ARMS: Final = ("base", "checkpoint", "export", "export_no_cache")


class LatencyCallback(GuardedCallback):
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
        log_artifact: also record the export as an artifact in W&B, by reference: no weights are copied or uploaded.
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
        log_artifact: bool = False,
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
        self.mirror = Mirror(artifact=log_artifact)
        self.rows: list[LatencyRow] = []
        self._training: Training | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before W&B starts: its files into `output_dir`, offline without a key; a user's `WANDB_*` wins."""
        with self._guarded("preparing W&B"):
            self.mirror.prepare(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.rows = []
        with self._guarded("finding the open trackers"):
            if state.is_world_process_zero:
                self.mirror.begin(self._folder(args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights: dict[str, torch.Tensor] | None = None
        with self._guarded("gathering the checkpoint to time"):
            if "checkpoint" in self.arms and is_sharded(kwargs["model"]):
                weights = gather(saved_state(kwargs["model"]))
        if state.is_world_process_zero:
            with self._guarded("the latency measurement"):
                self._measure(args, state, kwargs, weights)
        self._agree()  # a barrier: the other ranks would wait for rank 0 in a collective that gives up
        self._raise_if_strict()

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: Mapping[str, Any],
        weights: dict[str, torch.Tensor] | None,
    ) -> None:
        model = kwargs["model"]
        folder = self._folder(args)
        folder.mkdir(parents=True, exist_ok=True)
        inner = base_model(model)
        requests = find_requests(self.prompts, kwargs, limit=self.num_prompts)
        with tempfile.TemporaryDirectory(prefix=".plain-checkpoint-", dir=folder) as plain:
            if "checkpoint" in self.arms:
                save_as_plain_trainer(model, Path(plain), kwargs.get("processing_class"), weights=weights)
            arms = self._find_arms(model, Path(plain))
            findings = diagnose_arms({arm.name: arm.path for arm in arms if arm.use_cache is None})
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
        write_findings(folder, findings)
        self._training = Training.of(state.global_step, state.log_history)
        say(latency_table(self.rows))
        with self._guarded("the latency report"):
            self._show(args, folder)

    def _show(self, args: TrainingArguments, folder: Path) -> None:
        """The report and the pictures, then the trackers: from what is on disk."""
        try:
            review = load_review(folder)
        except InputError as error:  # rows of an older version in the same file: show at least this training's
            logger.warning("grpo_toolkit: %s; the report shows this training alone", error)
            review = Review(path=folder, rows=self.rows)
        self._write_card(args, review)
        pages = Pages(report=write_report(review), pictures=write_pictures(review, folder / "pictures"))
        say(f"rows: {folder / FILE_NAME}   report: {pages.report}")
        for line in self.mirror.log(review, pages, args):
            say(line)

    def _write_card(self, args: TrainingArguments, review: Review) -> None:
        """The section in the export's README.md: before the artifact, which records the manifest's sum."""
        export = next((row for row in self.rows if row.arm == "export"), None)
        if export is None or self._training is None:
            return
        base = next((row.path for row in self.rows if row.arm == "base"), None)
        with self._guarded("the model card"):
            write_model_card(
                export.path, review, training=self._training, base=base, around=Path(args.output_dir, CARD)
            )

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(self.output_dir) if self.output_dir is not None else Path(args.output_dir, FOLDER_NAME)

    def _find_arms(self, model: torch.nn.Module, plain: Path) -> list[Arm]:
        export = published.get(base_model(model))
        base = export.base if export is not None else base_folder(model)
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
