"""The callback that times base, checkpoint and export."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.callbacks.export import published
from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.errors import GateError, InputError
from grpo_toolkit.latency.bench.compare import compare_latency
from grpo_toolkit.latency.bench.gate import gate_of, missed_by
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm, fitting
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.explain.missed_gate import explain_missed
from grpo_toolkit.latency.rows.review import FOLDER_NAME, Review, load_review
from grpo_toolkit.latency.rows.store import FILE_NAME, append_rows
from grpo_toolkit.model.generation.request import find_requests, plain_request
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.offload_to_cpu import parked
from grpo_toolkit.model.save_hook import base_folder, save_as_plain_trainer, saved_state
from grpo_toolkit.model.sharding.gather import gather, is_sharded
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.folder_findings import diagnose_arms, write_findings
from grpo_toolkit.reporting.report.model_card import CARD, Training, write_model_card
from grpo_toolkit.reporting.report.page import Pages, write_report
from grpo_toolkit.reporting.terminal.console import say
from grpo_toolkit.reporting.terminal.explanation import explanation
from grpo_toolkit.reporting.terminal.tables import latency_table, ratio_lines
from grpo_toolkit.reporting.trackers.mirror import Mirror

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
    from grpo_toolkit.model.generation.request import Request

logger = logging.getLogger(__name__)

NO_CACHE: Final = "export_no_cache"
ARMS: Final = ("base", "checkpoint", "export", NO_CACHE)
LIVE: Final = "live"
"""The arm's name of the policy itself, measured between two steps."""

COST: Final = 0.01
"""How much of the training's own time the end may take, from the saving of the plain checkpoint to the last round."""

LEAST_BUDGET_S: Final = 60.0
"""What warm-up and rounds of all workloads may take together after a training so short that less would be left."""


class LatencyCallback(GuardedCallback):
    """Measures base, plain checkpoint and export at the end of training, in processes of their own.

    The arms: `base` as it was loaded; `checkpoint` as a plain trainer would have saved it (for LoRA: the adapter,
    unmerged, on its base); `export`; and `export_no_cache`, the export with its KV cache switched off, which shows
    what the cache is worth. Rows go to `<output_dir>/latency/latency.jsonl`; from there come `report.html` and
    pictures beside it, a section in the export's README.md, and what the trainer's W&B, Trackio or TensorBoard gets.
    Two workloads: answers of exactly `new_tokens`, and natural ones, which end where the model ends them; without
    `export_no_cache`, whose answers would be the export's own and take most of the time.

    Nothing runs between steps, unless `every_steps` asks for it. The end takes one percent of the training's own time:
    saving the plain checkpoint, loading a process per folder, warm-up and timed rounds of all workloads, of which the
    last two may have a minute, however short the training was; what one workload leaves is for the next. Outside of it
    are: the least that is asked of each arm on each workload, however slow it is (two answers to warm up, six timed
    ones or `rounds` if those are fewer, one under observation); the report and the trackers; for each folder that
    missed the gate, an explanation with a limit of its own, as long again, but three rounds at least.

    Model and optimizer wait on the CPU meanwhile, where they can be moved (not sharded, not quantised), because every
    arm's process needs room for a model; where a GPU has not enough, the checkpoint is left out. For want of that room
    no arm is timed a second time as a control (A/A), as `compare_latency` and `grpo-toolkit bench` do it: verdicts
    rest on the intervals alone.

    Args:
        arms: which of them, in this order; the others are compared with the first.
        new_tokens: tokens generated per request.
        rounds: measured requests per arm at most; all arms take turns. Fewer than six give no verdict.
        max_new_tokens: the cap of natural answers; None leaves that workload out.
        every_steps: also time the policy itself, between steps, every so many; training waits for it, four answers
            each time.
        prompts: dataset rows to ask; by default the first of the evaluation or training dataset.
        num_prompts: how many of them.
        output_dir: where to put the results; by default `latency` in the trainer's `output_dir`.
        gate: such as "max-slowdown=1.05": how much slower than the first arm the export may be (without an export,
            the other arms). One that misses it is explained: on the terminal, and by a row in `latency.jsonl`.
        log_artifact: also record the export as an artifact in W&B, by reference: no weights are copied or uploaded.
        strict: raise at the end of training if the measurement failed or the gate was missed.
    """

    def __init__(
        self,
        *,
        arms: Sequence[str] = ARMS,
        new_tokens: int = 64,
        rounds: int = 24,
        max_new_tokens: int | None = 256,
        every_steps: int | None = None,
        prompts: Iterable[Mapping[str, Any]] | None = None,
        num_prompts: int = 4,
        output_dir: str | os.PathLike[str] | None = None,
        gate: str | None = None,
        log_artifact: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arms {unknown}; choose from {list(ARMS)}")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; it counts steps, from 1 on")
        self.arms = tuple(arms)
        self.new_tokens = new_tokens
        self.rounds = rounds
        self.max_new_tokens = max_new_tokens
        self.every_steps = every_steps
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.output_dir = output_dir
        self.gate = None if gate is None else gate_of(gate)
        self.explanations: list[ExplanationRow] = []
        self.mirror = Mirror(artifact=log_artifact)
        self.rows: list[LatencyRow] = []
        self._training: Training | None = None
        self.live_rows: list[LatencyRow] = []
        self._began = self._ended = time.perf_counter()

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
        self.rows, self.live_rows, self.explanations = [], [], []
        self._began = time.perf_counter()
        with self._guarded("finding the open trackers"):
            if state.is_world_process_zero:
                self.mirror.begin(self._folder(args))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Only when asked: the policy itself, on rank 0, while the others wait."""
        if self.every_steps is None or state.global_step % self.every_steps:
            return
        with self._guarded("timing the policy between steps"):
            if is_sharded(kwargs["model"]):  # it cannot generate on one rank
                raise InputError("every_steps needs a model that is whole on every rank; this one is sharded")
            if state.is_world_process_zero:
                self._measure_live(args, state, kwargs)
        self._agree()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ended = time.perf_counter()
        weights: dict[str, torch.Tensor] | None = None
        with self._guarded("gathering the checkpoint to time"):
            if "checkpoint" in self.arms and is_sharded(kwargs["model"]):
                weights = gather(saved_state(kwargs["model"]))
        if state.is_world_process_zero:
            with self._guarded("the latency measurement"):
                self._measure(args, state, kwargs, weights)
        self._agree()  # a barrier: the other ranks would wait for rank 0 in a collective that gives up
        self._raise_if_strict()

    def _folder(self, args: TrainingArguments) -> Path:
        folder = Path(self.output_dir) if self.output_dir is not None else Path(args.output_dir, FOLDER_NAME)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _requests(self, kwargs: Mapping[str, Any]) -> list[Request]:
        return find_requests(self.prompts, kwargs, limit=self.num_prompts) or [plain_request()]

    def _measure_live(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        model = kwargs["model"]
        arm = Arm(
            name=LIVE,
            live=(model, kwargs["processing_class"]),
            options=Options(device=str(base_model(model).device)),
        )
        with inference_ready(model):
            rows = measure_latency([arm], self._requests(kwargs), new_tokens=self.new_tokens, rounds=2, warmup=1)
        rows = [replace(row, step=state.global_step) for row in rows]
        self.live_rows += rows
        append_rows(self._folder(args) / FILE_NAME, rows)
        self.mirror.log_scalars(self._review(self._folder(args), self.live_rows))

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: Mapping[str, Any],
        weights: dict[str, torch.Tensor] | None,
    ) -> None:
        model, folder = kwargs["model"], self._folder(args)
        requests = self._requests(kwargs)
        with tempfile.TemporaryDirectory(prefix=".plain-checkpoint-", dir=folder) as plain:
            if "checkpoint" in self.arms:
                save_as_plain_trainer(model, Path(plain), kwargs.get("processing_class"), weights=weights)
            arms = self._find_arms(model, Path(plain))
            if not arms:
                return
            as_saved = {arm.name: arm.place for arm in arms if arm.options.use_cache is None}
            write_findings(folder, diagnose_arms(as_saved))
            with parked(model, kwargs.get("optimizer")):
                timed = fitting(arms, spare=["checkpoint"])
                if len(timed) < len(arms):
                    say("no room on the GPU for all arms at once: the plain checkpoint is not timed")
                missed = self._time(timed, self._workloads(requests), folder, step=state.global_step)
                self._explain(missed, timed[0], requests, state, folder)
        self._training = Training.of(state.global_step, state.log_history)
        with self._guarded("the latency report"):
            self._show(args, folder)
        if missed:
            raise GateError("; ".join(dict.fromkeys(map(str, missed))))

    def _workloads(self, requests: Sequence[Request]) -> list[Traffic]:
        workloads = [traffic_of(requests, max_new_tokens=self.new_tokens)]
        if self.max_new_tokens is not None:
            workloads.append(traffic_of(requests, kind="natural", max_new_tokens=self.max_new_tokens))
        return workloads

    @property
    def _allowed_s(self) -> float:
        return COST * (self._ended - self._began)

    def _left_s(self, engines: Engines) -> float:
        """For warm-up and rounds: what the one percent leaves now, or what is left of the minute."""
        spent_s = time.perf_counter() - self._ended
        return max(self._allowed_s - spent_s, LEAST_BUDGET_S - engines.asked_s, 0.0)

    def _time(self, arms: Sequence[Arm], workloads: Sequence[Traffic], folder: Path, *, step: int) -> list[Missed]:
        """Time the arms on each workload, and put the rows on disk as they come; what missed the gate."""
        missed: list[Missed] = []
        say(f"loading {len(arms)} arms to time them: {', '.join(arm.name for arm in arms)}")
        with Engines() as engines:
            for left, traffic in zip(range(len(workloads), 0, -1), workloads, strict=True):
                share_s = self._left_s(engines) / left
                timed = [arm for arm in arms if traffic.kind == "fixed" or arm.name != NO_CACHE]
                if not timed:
                    continue
                say(self._announcement(traffic, len(timed), share_s))
                compared = compare_latency(
                    timed, traffic, rounds=self.rounds, control=False, budget_s=share_s, engines=engines
                )
                rows = [replace(row, step=step) for row in compared.rows]
                append_rows(folder / FILE_NAME, rows)
                say(latency_table(rows), *ratio_lines(rows))
                self.rows += rows
                missed += self._missed(rows)
        return missed

    def _announcement(self, traffic: Traffic, arms: int, budget_s: float) -> str:
        tokens = f"{'up to ' if traffic.kind == 'natural' else ''}{traffic.max_new_tokens} tokens"
        rounds = f"{MIN_PAIRS} to {self.rounds}" if self.rounds > MIN_PAIRS else str(self.rounds)
        return f"timing {arms} arms, {traffic.name} answers of {tokens} (rounds: {rounds}; limit {budget_s:.0f} s)"

    def _missed(self, rows: Sequence[LatencyRow]) -> list[Missed]:
        """What misses the gate: the export, or where none was measured any arm but the first."""
        if self.gate is None:
            return []
        missed = missed_by(self.gate, rows)
        has_export = any(row.arm == "export" for row in rows[1:])
        return [miss for miss in missed if miss.arm == "export" or not has_export]

    def _explain(
        self,
        missed: Sequence[Missed],
        first: Arm,
        requests: Sequence[Request],
        state: TrainerState,
        folder: Path,
    ) -> None:
        device, budget_s = first.options.device, max(LEAST_BUDGET_S, self._allowed_s)
        rows = explain_missed(
            first.place, missed, device=device, requests=requests, max_new_tokens=self.new_tokens, budget_s=budget_s
        )
        self.explanations = [replace(row, step=state.global_step) for row in rows]
        append_rows(folder / FILE_NAME, self.explanations)
        for row in self.explanations:
            say(explanation(row))

    def _show(self, args: TrainingArguments, folder: Path) -> None:
        """The report and the pictures, then the trackers: from what is on disk."""
        review = self._review(folder, [*self.live_rows, *self.rows])
        self._write_card(args, review)
        pages = Pages(report=write_report(review), pictures=write_pictures(review, folder / "pictures"))
        say(f"rows: {folder / FILE_NAME}   report: {pages.report}")
        for line in self.mirror.log(review, pages, args):
            say(line)

    def _review(self, folder: Path, rows: list[LatencyRow]) -> Review:
        try:
            return load_review(folder)
        except InputError as error:  # rows of an older version in the same file: show at least this training's
            logger.warning("grpo_toolkit: %s; this training's rows are shown alone", error)
            return Review(path=folder, rows=rows)

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

    def _find_arms(self, model: torch.nn.Module, plain: Path) -> list[Arm]:
        inner = base_model(model)
        export = published.get(inner)
        base = export.base if export is not None else base_folder(model)
        folders = {
            "base": base,
            "checkpoint": plain,
            "export": None if export is None else export.path,
            NO_CACHE: None if export is None else export.path,
        }
        missing = [arm for arm in self.arms if folders[arm] is None]
        if missing:
            logger.warning("grpo_toolkit: nothing to measure for %s (no such folder in this run)", ", ".join(missing))
        attention = getattr(inner.config, "_attn_implementation", None)
        options = Options(device=str(inner.device), attn_implementation=attention)
        return [
            Arm(name=arm, path=path, options=replace(options, use_cache=False if arm == NO_CACHE else None))
            for arm in self.arms
            if (path := folders[arm]) is not None
        ]
