"""The callback that times base, checkpoint and export."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.callbacks.export import format_rewards
from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.callbacks.latency_budget import ARMS, Budget, EndMeasurement, Settings, find_arms
from grpo_toolkit.errors import GateError, InputError
from grpo_toolkit.latency.bench.batches import SIZES
from grpo_toolkit.latency.bench.gate import gate_of
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.review import FOLDER_NAME, Review, load_review
from grpo_toolkit.latency.rows.store import FILE_NAME, append_rows
from grpo_toolkit.model.generation.drawn_pictures import requests_to
from grpo_toolkit.model.generation.judge import Judge
from grpo_toolkit.model.generation.request import find_asked, find_requests
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.offload_to_cpu import offloaded_to_cpu
from grpo_toolkit.model.saving.save_hook import save_as_plain_trainer, saved_state
from grpo_toolkit.model.sharding.gather import gather, is_sharded
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.card_facts import CardFacts, Training, system_prompt_of, tags_of_training
from grpo_toolkit.reporting.report.folder_findings import diagnose_arms, findings_of, write_findings
from grpo_toolkit.reporting.report.model_card import write_model_card
from grpo_toolkit.reporting.report.page import Pages, write_report
from grpo_toolkit.reporting.report.screen_lines import latency_lines, line, verdict_lines
from grpo_toolkit.reporting.terminal.console import say
from grpo_toolkit.reporting.trackers.mirror import Mirror

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
    from grpo_toolkit.model.generation.request import Request

logger = logging.getLogger(__name__)

LIVE: Final = "live"
"""The arm's name of the model in training, measured between two steps."""


class LatencyCallback(GuardedCallback):
    """A callback that times base, plain checkpoint and export at the end of training, in processes of their own.

    The arms: `base` as it was loaded; `checkpoint` as a plain trainer would have saved it (for LoRA: the adapter,
    unmerged, on its base); `export`; and `export_no_cache`, the export with its KV cache switched off, which shows
    what the cache is worth. Rows go to `<output_dir>/latency/latency.jsonl`; from there come `report.html` and
    pictures beside it, a section in the export's README.md, and what the trainer's W&B, Trackio or TensorBoard gets.
    Two workloads: answers of exactly `new_tokens`, and natural ones, which end where the model ends them; without
    `export_no_cache`, whose answers would be the export's own and take most of the time.

    Two questions besides. How much of an answer's time is thinking? The export answers natural prompts with and
    without their instruction to think, in turns, and reward functions pay both. Which batch, and how much memory? The
    export is timed at several batch sizes, as far as the time allows, on a GPU also at the largest that fits.

    Nothing runs between steps, unless `every_steps` asks for it. The end takes one percent of the training's own time.
    That covers saving the plain checkpoint, loading a process for each folder, and warm-up and timed rounds of all
    workloads; these two get a minute even if one percent is less. Time that one workload leaves goes to the next.

    On top of that come: the least that is asked of each arm on each workload, however slow it is (two answers to warm
    up, six timed ones or `rounds` if those are fewer, one under observation); the report and the trackers; and, for
    each folder that missed the gate, an explanation, which takes as long again at most, but makes three rounds at
    least. After a training of less than a minute the timing may take as long as the training did (20 seconds at
    least). Then two timed answers are enough, a workload without time left is not asked, and a line says what was left
    out.

    Model and optimizer wait on the CPU meanwhile, if they can be moved (not sharded, not quantised), because every
    arm's process needs room for a model. If a GPU has too little room, the checkpoint is left out. No arm is timed a
    second time as a control (A/A), as `compare_latency` and `grpo-toolkit bench` do, since that takes room as well:
    verdicts rest on the intervals alone.

    Args:
        arms: which of them, in this order; the others are compared with the first.
        new_tokens: tokens generated per request.
        rounds: measured requests per arm at most; all arms take turns. Fewer than six give no verdict.
        max_new_tokens: the cap of natural answers; None leaves that workload out.
        every_steps: also time the model in training, between steps, every so many; training waits for it, four answers
            each time.
        thinking: the instruction to think, which the export is asked without, too: a system message or a part of a
            message. True finds it in the prompts: a system message, or a user's sentences, that name `<think>`; where
            none does, nothing is asked without it. False asks nothing without it.
        reward_funcs: the training's reward functions, as its trainer takes them, which pay the natural answers with
            the trainer's weights; by default the one that `ExportCallback` verifies the form of answers with.
        batch_sizes: at which the export is timed, in rising order; () leaves that out.
        prompts: dataset rows to ask; by default the first of the evaluation or training dataset.
        num_prompts: how many of them.
        output_dir: where to put the results; by default `latency` in the trainer's `output_dir`.
        gate: such as "max-slowdown=1.05": how much slower than the first arm the export may be (without an export,
            the other arms). One that misses it is explained: on the terminal, and by a row in `latency.jsonl`.
        tells_verdict: print the verdict, the faults and the report's place at the end; off for a script that prints a
            summary of its own.
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
        thinking: str | bool = True,
        reward_funcs: Sequence[Any] = (),
        batch_sizes: Sequence[int] = SIZES,
        every_steps: int | None = None,
        prompts: Iterable[Mapping[str, Any]] | None = None,
        num_prompts: int = 4,
        output_dir: str | os.PathLike[str] | None = None,
        gate: str | None = None,
        tells_verdict: bool = True,
        log_artifact: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arms {unknown}; choose from {list(ARMS)}")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; it counts steps, from 1 on")
        self.settings = Settings(
            arms=tuple(arms),
            new_tokens=new_tokens,
            rounds=rounds,
            max_new_tokens=max_new_tokens,
            max_slowdown=None if gate is None else gate_of(gate),
            thinking=thinking,
            batch_sizes=tuple(batch_sizes),
        )
        self.reward_funcs = reward_funcs
        self.every_steps = every_steps
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.output_dir = output_dir
        self.tells_verdict = tells_verdict
        self.explanations: list[ExplanationRow] = []
        self.mirror = Mirror(artifact=log_artifact)
        self.rows: list[LatencyRow] = []
        self._facts: CardFacts | None = None
        self.live_rows: list[LatencyRow] = []
        self._began = self._ended = time.perf_counter()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare W&B before it starts: files into `output_dir`, offline without a key; a user's `WANDB_*` wins."""
        with self._guarded("preparing W&B"):
            config = getattr(base_model(kwargs["model"]), "config", None)
            self.mirror.prepare(args, base=getattr(config, "_name_or_path", None))

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
        """Time the model in training, only when asked, on rank 0 while the others wait."""
        if self.every_steps is None or state.global_step % self.every_steps:
            return
        with self._guarded("timing the model between steps"):
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
            if "checkpoint" in self.settings.arms and is_sharded(kwargs["model"]):
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

    def _requests(self, state: TrainerState, kwargs: Mapping[str, Any]) -> list[Request]:
        found = find_requests(self.prompts, kwargs, limit=self.num_prompts, state=state)
        return found or requests_to(kwargs["model"], kwargs["processing_class"])

    def _judge(self, args: TrainingArguments, state: TrainerState, model: Any, rows: Sequence[Any]) -> Judge | None:
        """Return what pays natural answers: the training's own functions, or the export's for their form."""
        if self.reward_funcs:
            weights = getattr(args, "reward_weights", None)
            return Judge(functions=self.reward_funcs, rows=rows, weights=weights, state=state)
        form = format_rewards.get(base_model(model))
        return None if form is None else Judge(functions=[form], rows=rows, state=state)

    def _measure_live(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        model = kwargs["model"]
        arm = Arm(
            name=LIVE,
            live=(model, kwargs["processing_class"]),
            options=Options(device=str(base_model(model).device)),
        )
        with inference_ready(model):
            rows = measure_latency(
                [arm],
                self._requests(state, kwargs),
                new_tokens=self.settings.new_tokens,
                rounds=2,
                warmup=1,
                progress=False,
            )
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
        asked = find_asked(self.prompts, kwargs, limit=self.num_prompts, state=state)
        end = EndMeasurement(
            settings=self.settings,
            budget=Budget(began=self._began, ended=self._ended),
            requests=[request for request, _ in asked] or requests_to(model, kwargs["processing_class"]),
            folder=folder,
            step=state.global_step,
            judge=self._judge(args, state, model, [row for _, row in asked]),
        )
        self.rows, self.explanations = end.rows, end.explanations
        with tempfile.TemporaryDirectory(prefix=".plain-checkpoint-", dir=folder) as plain:
            if "checkpoint" in self.settings.arms:
                save_as_plain_trainer(model, Path(plain), kwargs.get("processing_class"), weights=weights)
            arms = find_arms(self.settings.arms, model, Path(plain))
            if not arms:
                return
            as_saved = {arm.name: arm.place for arm in arms if arm.options.use_cache is None}
            write_findings(folder, diagnose_arms(as_saved))
            with offloaded_to_cpu(model, kwargs.get("optimizer")):
                missed = end.run(arms)
        self._facts = CardFacts(
            training=Training.of(state.global_step, state.log_history, args),
            system_prompt=system_prompt_of(end.requests[0].messages),
            tags=tags_of_training(model, args),
        )
        with self._guarded("the latency report"):
            self._show(args, folder)
        if missed:
            raise GateError("; ".join(dict.fromkeys(map(str, missed))))
        for problem in end.problems:
            raise problem

    def _show(self, args: TrainingArguments, folder: Path) -> None:
        """Write the report and the pictures, then log to the trackers, all from what is on disk."""
        review = self._review(folder, [*self.live_rows, *self.rows])
        self._write_card(review)
        pages = Pages(report=write_report(review), pictures=write_pictures(review, folder / "pictures"))
        said = [*verdict_lines(review, findings_of(review)), line("report", str(pages.report))]
        say(*latency_lines(self.rows), *(said if self.tells_verdict else ()))
        for hint in self.mirror.log(review, pages, args):
            say(hint)

    def _review(self, folder: Path, rows: list[LatencyRow]) -> Review:
        try:
            return load_review(folder)
        except InputError as error:  # rows of an older version in the same file: show at least this training's
            logger.warning("grpo_toolkit: %s; this training's rows are shown alone", error)
            return Review(path=folder, rows=rows)

    def _write_card(self, review: Review) -> None:
        """Write the export's page, before the artifact, which records the manifest's sum."""
        export = next((row for row in self.rows if row.arm == "export"), None)
        if export is None:
            return
        with self._guarded("the export's page"):
            write_model_card(export.path, review, facts=self._facts)
