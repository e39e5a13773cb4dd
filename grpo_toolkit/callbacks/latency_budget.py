"""The measurement at the end of a training: its arms, its budget, its rounds, and the gate."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from grpo_toolkit.callbacks.export import published
from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.latency.bench.batches import SIZES, time_batches
from grpo_toolkit.latency.bench.compare import compare_latency, compare_rows
from grpo_toolkit.latency.bench.gate import missed_by
from grpo_toolkit.latency.bench.measure import Plan
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS
from grpo_toolkit.latency.bench.thinking import compare_thinking, thinking_in
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm, fitting
from grpo_toolkit.latency.engines.pool import Engines, Source
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.explain.explanation import explain_missed
from grpo_toolkit.latency.rows.store import FILE_NAME, append_rows
from grpo_toolkit.model.generation.thinking_instruction import find_thinking
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.saving.save_hook import base_folder
from grpo_toolkit.reporting.report.screen_lines import line
from grpo_toolkit.reporting.terminal.console import say
from grpo_toolkit.reporting.terminal.explanation import explanation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
    from grpo_toolkit.model.generation.judge import Judge
    from grpo_toolkit.model.generation.request import Request

logger = logging.getLogger(__name__)

NO_CACHE: Final = "export_no_cache"
ARMS: Final = ("base", "checkpoint", "export", NO_CACHE)

COST: Final = 0.01
"""The share of the training's own time that the end may take, from saving the plain checkpoint to the last round."""

LEAST_BUDGET_S: Final = 60.0
"""Seconds for warm-up and rounds of all workloads together, after a training so short that less would be left."""

SMOKE_BUDGET_S: Final = 20.0
"""The same after a training that took less than that: whoever tries three steps waits for the end, too."""

SMOKE_ROUNDS: Final = 2
"""Rounds after which a training shorter than `LEAST_BUDGET_S` may have no time for more; they give no verdict."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `LatencyCallback` for the end of a training (see there)."""

    arms: tuple[str, ...]
    new_tokens: int
    rounds: int
    max_new_tokens: int | None
    max_slowdown: float | None
    thinking: str | bool = True
    batch_sizes: tuple[int, ...] = SIZES

    def find_thinking(self, requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
        """Return the requests as they ask for thoughts, and without that; two empty lists where they are not asked."""
        if self.thinking is False or self.max_new_tokens is None:
            return [], []
        return find_thinking(requests, None if self.thinking is True else self.thinking)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time that the measurement at the end of a training may take; its two times are `time.perf_counter`'s."""

    began: float
    ended: float

    @property
    def allowed_s(self) -> float:
        """The seconds that the measurement may take: the share `COST` of the training's own time."""
        return COST * self.training_s

    @property
    def training_s(self) -> float:
        """The seconds that the training took."""
        return self.ended - self.began

    @property
    def least_s(self) -> float:
        """The seconds that are left for warm-up and rounds however short the training was: its own, within limits."""
        return min(LEAST_BUDGET_S, max(SMOKE_BUDGET_S, self.training_s))

    @property
    def timing_s(self) -> float:
        """The seconds that warm-up and rounds have, if saving and loading take none of them."""
        return max(self.least_s, self.allowed_s)

    @property
    def least_rounds(self) -> int:
        """The rounds that are made however slow the arms are: six give a verdict, which no smoke run asks for."""
        return SMOKE_ROUNDS if self.training_s < LEAST_BUDGET_S else MIN_PAIRS

    def left_s(self, asked_s: float) -> float:
        """Return the seconds left for warm-up and rounds: one percent of the training, or `least_s` if more."""
        spent_s = time.perf_counter() - self.ended
        return max(self.allowed_s - spent_s, self.least_s - asked_s, 0.0)


@dataclass(frozen=True, kw_only=True)
class EndMeasurement:
    """A measurement at the end of a training; its rows are on disk as soon as they are known.

    Its questions, each with an equal share of the time that is left: how fast are all arms at one length, what are
    their natural answers (and what does thinking cost the export), and which batch is worth its memory? A question
    that fails after one that was answered ends alone, and is in `problems`.
    """

    settings: Settings
    budget: Budget
    requests: Sequence[Request]
    folder: Path
    step: int
    judge: Judge | None = None
    rows: list[LatencyRow] = field(default_factory=list)
    explanations: list[ExplanationRow] = field(default_factory=list)
    problems: list[GrpoToolkitError] = field(default_factory=list)

    def run(self, arms: Sequence[Arm]) -> list[Missed]:
        """Time the arms, explain those that missed the gate, and return them."""
        timed = fitting(arms, spare=["checkpoint"])
        if len(timed) < len(arms):
            say("no room on the GPU for all arms at once: the plain checkpoint is not timed")
        missed = self._time(timed)
        self._explain(missed, timed[0])
        return missed

    def _time(self, arms: Sequence[Arm]) -> list[Missed]:
        names = [arm.name for arm in arms]
        has_natural = self.settings.max_new_tokens is not None and any(name != NO_CACHE for name in names)
        questions = {"fixed answers": self._fixed}
        questions |= {"natural answers": self._natural} if has_natural else {}
        questions |= {"batches": self._batches} if self.settings.batch_sizes and "export" in names else {}
        say(line("timing", f"{', '.join(names)} in turns, about {self.budget.left_s(0.0):.0f} s"))
        missed: list[Missed] = []
        with Engines() as engines:
            for left, (name, question) in zip(range(len(questions), 0, -1), questions.items(), strict=True):
                share_s = self.budget.left_s(engines.asked_s) / left
                if self.rows and not share_s and self.budget.least_rounds < MIN_PAIRS:
                    self._say_left_out(name)
                    continue
                before = len(self.rows)
                try:
                    for rows in question(arms, engines, share_s):
                        missed += self._missed(self._keep(rows))
                except GrpoToolkitError as error:  # what was answered before is worth its report
                    if not self.rows:
                        raise
                    self.problems.append(error)
                    say(line("left out", f"{name}: {error}"))
                    continue
                answered = [row.rounds for row in self.rows[before:] if row.error is None]
                if not answered and before == len(self.rows):
                    self._say_left_out(name)
                elif answered and max(answered) < min(MIN_PAIRS, self.settings.rounds):
                    self._say_left_out(f"{name} after {max(answered)} rounds, of which a verdict takes {MIN_PAIRS}")
        return missed

    def _keep(self, rows: Sequence[LatencyRow]) -> list[LatencyRow]:
        found = [replace(row, step=self.step) for row in rows]
        append_rows(self.folder / FILE_NAME, found)
        self.rows.extend(found)
        return found

    def _say_left_out(self, what: str) -> None:
        budget = self.budget
        said = f"{what}: a training of {budget.training_s:.0f} s leaves {budget.timing_s:.0f} s for its timing"
        say(line("left out", said))

    def _fixed(self, arms: Sequence[Arm], engines: Engines, share_s: float) -> Iterator[Sequence[LatencyRow]]:
        traffic = traffic_of(self.requests, max_new_tokens=self.settings.new_tokens)
        yield compare_latency(
            arms,
            traffic,
            rounds=self.settings.rounds,
            control=False,
            budget_s=share_s,
            least_rounds=self.budget.least_rounds,
            engines=engines,
            progress=False,
        ).rows

    def _natural(self, arms: Sequence[Arm], engines: Engines, share_s: float) -> Iterator[Sequence[LatencyRow]]:
        """Ask what ends where the model ends it; the export also without the instruction to think, if there is one."""
        assert self.settings.max_new_tokens is not None
        timed = [arm for arm in arms if arm.name != NO_CACHE]
        thinking, direct = self.settings.find_thinking(self.requests)
        make = partial(traffic_of, kind="natural", max_new_tokens=self.settings.max_new_tokens)
        usual = make(thinking or self.requests, thinking=None)
        plan = Plan(
            arms=timed,
            traffic=replace(usual, thinking=True) if thinking else usual,
            rounds=self.settings.rounds,
            budget_s=share_s,
            judge=self.judge,
            least_rounds=self.budget.least_rounds,
        )
        if not direct:
            rows = compare_rows(plan.measured(engines)).rows
            if self.settings.thinking is not False and not thinking_in(rows):
                say(line("thinking", "the prompts name no <think>: none is asked without it (thinking=...)"))
            yield rows
            return
        asked = next((arm.name for arm in timed if arm.name == "export"), timed[-1].name)
        pair = compare_thinking(
            plan, replace(make(direct), name="natural_direct", thinking=False), engines=engines, only=[asked]
        )
        yield from (compared.rows for compared in pair)

    def _batches(self, arms: Sequence[Arm], engines: Engines, share_s: float) -> Iterator[Sequence[LatencyRow]]:
        """Time the export at several batch sizes, alone on its device."""
        export = next(arm for arm in arms if arm.name == "export")
        for arm in arms:
            if arm.engine_key != export.engine_key and arm.path is not None:
                engines.release(Source(path=arm.path))
        traffic = traffic_of(self.requests, max_new_tokens=self.settings.new_tokens)
        yield time_batches(
            export,
            traffic,
            engines=engines,
            rounds=self.settings.rounds,
            budget_s=share_s,
            sizes=self.settings.batch_sizes,
        )

    def _missed(self, rows: Sequence[LatencyRow]) -> list[Missed]:
        """Return the arms that miss the gate: the export, or where none was measured any arm but the first."""
        if self.settings.max_slowdown is None:
            return []
        missed = missed_by(self.settings.max_slowdown, rows)
        has_export = any(row.arm == "export" for row in rows[1:])
        return [miss for miss in missed if miss.arm == "export" or not has_export]

    def _explain(self, missed: Sequence[Missed], first: Arm) -> None:
        rows = explain_missed(
            first.place,
            missed,
            device=first.options.device,
            requests=self.requests,
            max_new_tokens=self.settings.new_tokens,
            budget_s=self.budget.timing_s,
        )
        self.explanations.extend(replace(row, step=self.step) for row in rows)
        append_rows(self.folder / FILE_NAME, self.explanations)
        for row in self.explanations:
            say(explanation(row))


def find_arms(names: Sequence[str], model: torch.nn.Module, plain: Path) -> list[Arm]:
    """Return the arms that can be timed after this training.

    Args:
        names: some of `ARMS`, in the order wanted; one without a folder in this run is left out with a warning.
        model: the trained model.
        plain: the folder of the checkpoint as a plain trainer would have saved it.
    """
    inner = base_model(model)
    export = published.get(inner)
    base = export.base if export is not None else base_folder(model)
    folders = {
        "base": base,
        "checkpoint": plain,
        "export": None if export is None else export.path,
        NO_CACHE: None if export is None else export.path,
    }
    missing = [name for name in names if folders[name] is None]
    if missing:
        logger.warning("grpo_toolkit: nothing to measure for %s (no such folder in this run)", ", ".join(missing))
    attention = getattr(inner.config, "_attn_implementation", None)
    options = Options(device=str(inner.device), attn_implementation=attention)
    return [
        Arm(name=name, path=path, options=replace(options, use_cache=False if name == NO_CACHE else None))
        for name in names
        if (path := folders[name]) is not None
    ]
