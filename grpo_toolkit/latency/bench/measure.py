"""The measurement: the same requests on several models, timed fairly.

Each model is loaded in a process of its own, all are warmed up until their times agree, and then they take turns in
counterbalanced blocks (`statistics.turns`), so that a machine that drifts or is shared slows all arms alike. Medians
and quartiles are over rounds; the raw times of every token are kept (see `row`). What needs no clock (cache, lengths)
is asked once more after the timed rounds, because the hooks for it would slow them.

On a noisy machine the times never agree, so a budget ends the warm-up too. A process that has answered already, for
another arm or for an earlier workload, has its kernels and its memory: only what is new to it warms up.
"""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from grpo_toolkit.errors import InputError, OutOfMemoryError, UnsupportedError, WorkerError
from grpo_toolkit.latency.bench.build_row import row_of_arm
from grpo_toolkit.latency.bench.pairs import is_precise
from grpo_toolkit.latency.bench.progress import shown
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS, is_steady, turns
from grpo_toolkit.latency.bench.workload import (
    MADE_UP_PROMPT_TOKENS,
    Traffic,
    made_up,
    traffic_of,
    usual_image_tokens,
)
from grpo_toolkit.latency.engines.arms import named_arms, processor_of
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import Measured
from grpo_toolkit.model.generation.request_forms import requests_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from grpo_toolkit.latency.bench.progress import Progress
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Answer, Engine, Options
    from grpo_toolkit.latency.rows.row import LatencyRow
    from grpo_toolkit.model.generation.judge import Judge

    Keep = Callable[[list[LatencyRow]], None]

_Found = TypeVar("_Found")

MAX_WARMUP: Final = 10
"""Requests per arm after which warm-up ends even if its times never agree."""

LEAST_WARMUP: Final = 2
"""Requests per arm before which it never ends: the first of them meets every shape and kernel for the first time."""

WARMUP_SHARE: Final = 1 / 3
"""Of a budget: what warm-up may take of it."""

_TOO_LITTLE: Final = "measure_latency needs at least one arm, one request, one round and one new token"

MOST_TIMES: Final = 20
"""So many times the rounds asked for, and no more, are measured for the sake of precision."""


def measure_latency(
    arms: Sequence[Arm] | Mapping[str, str | os.PathLike[str]],
    requests: Any = None,
    *,
    device: str | None = None,
    new_tokens: int = 64,
    rounds: int = 12,
    warmup: int | None = None,
    options: Options | None = None,
    roofline: bool = False,
    precision: float | None = None,
    budget_s: float | None = None,
    progress: Progress | bool | None = None,
    engines: Engines | None = None,
) -> list[LatencyRow]:
    """Time the arms on the same requests, in turns.

    Args:
        arms: what to time, or simply {name: folder}.
        requests: asked one a round, from the first on, each for exactly `new_tokens` tokens: a question, a file of
            JSON lines, rows of a dataset, chat messages or `Request`s; or a workload of its own (`workload.made_up`,
            `workload.traffic_of`). By default made-up ones of 512 tokens, with an image of 256 where the model sees.
        device: where folders are loaded and run, such as "cuda"; arms have their own.
        new_tokens: tokens to generate per request.
        rounds: measured requests per arm.
        warmup: unmeasured requests per arm before, exactly; None goes on until their times agree, two at least and
            ten at most, and gives two alone to an arm whose process is warm already (`Arm.warm_key`): from an earlier
            measurement with the same `engines`, or by another arm that shares it.
        options: how the folders of a mapping are loaded and run; arms have their own.
        roofline: measure the bandwidth of each arm's device, and what physics would allow.
        precision: go on after `rounds` until the interval of every arm's TPOT over the first arm's reaches no further
            than this to either side (0.02: two percent), or the ratio is clear by far; at most twenty times `rounds`.
            Stopping by width favours no verdict (Chow and Robbins 1965, doi:10.1214/aoms/1177700156).
        budget_s: seconds for warm-up and rounds together, from when all models are loaded. Warm-up (unless `warmup`
            counts it) ends after a third of them, but not before two requests per arm; the rounds end after the block
            that uses them up, but not before six, or `rounds` if those are fewer. The proof comes on top: one request
            per arm.
        progress: called with the arm's name, the round (below zero: warm-up) and the number of rounds; True shows a
            bar, False nothing. By default a bar in terminals and notebooks.
        engines: loaded models of an earlier measurement, used again and left open.

    Returns:
        One row per arm, in the order given. An arm that ran out of memory, or that no kernel can run as it was told
        to, has a row with an `error` and no times.

    Raises:
        InputError: no arms, no requests, fewer than one round, or two arms of one name.
        CheckpointError, WorkerError: an arm's folder cannot be read or loaded, or its endpoint does not answer.
    """
    named = named_arms(arms, options, device=device)
    with shown(progress, [arm.name for arm in named]) as called:
        plan = Plan(
            arms=named,
            traffic=traffic_for(requests, new_tokens, arms=named),
            rounds=rounds,
            warmup=warmup,
            roofline=roofline,
            precision=precision,
            budget_s=budget_s,
            progress=called,
        )
        return plan.measured(engines)


def traffic_for(requests: Any, new_tokens: int, *, arms: Sequence[Arm]) -> Traffic:
    """Return the workload that `measure_latency` means: requests for `new_tokens` each, or a workload as it is.

    Raises:
        InputError: no requests, no tokens, or requests in no known form.
    """
    if new_tokens < 1 or not arms:
        raise InputError(_TOO_LITTLE)
    if isinstance(requests, Traffic):
        return requests
    if requests is None:
        processor = processor_of(arms)
        image_tokens = usual_image_tokens(processor)
        return made_up(
            processor, prompt_tokens=MADE_UP_PROMPT_TOKENS, image_tokens=image_tokens, max_new_tokens=new_tokens
        )
    if not requests:
        raise InputError(_TOO_LITTLE)
    return traffic_of(requests_of(requests), max_new_tokens=new_tokens)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A measurement before it runs (see `measure_latency`).

    Attributes:
        workloads: of the arms, by name, that are asked something else than `traffic`.
        judge: what pays for natural answers.
        keep: called after every round with the rows so far, which have no ratios yet.

    Raises:
        InputError: no arms, or fewer than one round.
    """

    arms: Sequence[Arm]
    traffic: Traffic
    rounds: int
    warmup: int | None = None
    roofline: bool = False
    precision: float | None = None
    budget_s: float | None = None
    progress: Progress | None = None
    least_rounds: int = MIN_PAIRS
    workloads: Mapping[str, Traffic] = field(default_factory=dict)
    judge: Judge | None = None
    keep: Keep | None = None

    def __post_init__(self) -> None:
        if not self.arms or self.rounds < 1:
            raise InputError(_TOO_LITTLE)

    def measured(self, engines: Engines | None) -> list[LatencyRow]:
        """Carry the plan out, on open engines or on new ones that are closed afterwards."""
        with ExitStack() as stack:
            measuring = _Measuring(engines or stack.enter_context(Engines()), self)
            measuring.warm_up()
            measuring.run()
            measuring.look_around()
            measuring.prove()
            if self.roofline:
                measuring.probe_hardware()
            measuring.pool.asked_s += measuring.spent_s
            return measuring.rows()

    def asked(self, arm: str) -> Traffic:
        """Return the workload of an arm."""
        return self.workloads.get(arm, self.traffic)


class _Measuring:
    """The engines of one session, and what they have answered."""

    def __init__(self, engines: Engines, plan: Plan) -> None:
        arms = plan.arms
        self.plan = plan
        self.arms = {arm.name: arm for arm in arms}
        self.session = uuid.uuid4().hex
        self.found = {arm.name: Measured() for arm in arms}
        self.pool = engines
        self.engines = {arm.name: engines.open(arm) for arm in arms}  # all begin to load before any is waited for
        for arm in arms:
            try:
                self.found[arm.name].facts = self.engines[arm.name].facts()
            except WorkerError as error:
                if "OutOfMemoryError" not in str(error):
                    raise
                self.found[arm.name].error = f"out of memory while loading: {error}"
        self._began = time.perf_counter()

    @property
    def spent_s(self) -> float:
        """The seconds since the models were loaded."""
        return time.perf_counter() - self._began

    def _alive(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.found[name].error is None]

    def _ask(self, name: str, turn: int, rounds: int) -> float | None:
        """Ask one arm once; returns the time that warm-up watches, or None where the failure is a result."""
        found, traffic = self.found[name], self.plan.asked(name)
        batch = traffic.batch(turn)
        start = time.perf_counter()
        try:
            answer = self.engines[name].ask(batch, self.arms[name].options)
        except (OutOfMemoryError, UnsupportedError) as error:
            found.error = str(error)
            return None
        spent = time.perf_counter() - start
        if turn >= 0:
            found.answers.append(self._judged(answer, traffic, turn))
        else:
            found.warmup_s += spent
        if self.plan.progress is not None:
            self.plan.progress(name, turn, rounds)
        # Natural answers are of different lengths: only their pace can agree.
        pace = answer.timeline.tpot_s if traffic.kind == "natural" else None
        return answer.timeline.e2e_s if pace is None else pace

    def _judged(self, answer: Answer, traffic: Traffic, turn: int) -> Answer:
        if self.plan.judge is None or traffic.kind == "fixed" or len(answer.texts) != 1:
            return answer
        tokens = answer.tokens[0] if answer.tokens else []
        reward = self.plan.judge.reward(turn, answer.texts[0], tokens)
        return replace(answer, timeline=replace(answer.timeline, reward=reward))

    def warm_up(self) -> None:
        """Ask until the times agree, or as often as the plan says."""
        count, budget_s = self.plan.warmup, self.plan.budget_s
        seconds: dict[str, list[float]] = {name: [] for name in self.arms}
        most = MAX_WARMUP if count is None else count
        for index in range(most):
            is_late = budget_s is not None and self.spent_s > WARMUP_SHARE * budget_s
            waiting = self._alive(turns(list(self.arms), index))
            if count is None:
                waiting = [name for name in waiting if not self._is_warm(name, seconds[name], is_late=is_late)]
            for name in waiting:
                spent = self._ask(name, index - most, most)
                if spent is not None:
                    seconds[name].append(spent)
        enough = [name for name in self._alive(list(self.arms)) if len(seconds[name]) >= LEAST_WARMUP]
        self.pool.warm |= {self.arms[name].warm_key for name in enough}

    def _is_warm(self, name: str, seconds: Sequence[float], *, is_late: bool) -> bool:
        if len(seconds) < LEAST_WARMUP:
            return False
        key = self.arms[name].warm_key
        first = next(other for other in self._alive(list(self.arms)) if self.arms[other].warm_key == key)
        return is_late or first != name or key in self.pool.warm or is_steady(seconds)

    def run(self) -> None:
        """Make the timed rounds."""
        rounds, budget_s, precision = self.plan.rounds, self.plan.budget_s, self.plan.precision
        most = rounds if precision is None else MOST_TIMES * rounds
        look = rounds
        for turn in range(most):
            # Whole blocks only: an odd round is what balances the even one before it.
            if turn >= self.plan.least_rounds and turn % 2 == 0:
                if budget_s is not None and self.spent_s > budget_s:
                    return
                if precision is not None and turn >= look:
                    if self._is_precise(precision):
                        return
                    look = turn * 5 // 4
            alive = self._alive(turns(list(self.arms), turn))
            if not alive:
                return
            for name in alive:
                self._ask(name, turn, rounds)
            if self.plan.keep is not None:
                self.plan.keep(self.rows())

    def _is_precise(self, precision: float) -> bool:
        alive = self._alive(list(self.arms))
        return is_precise([[answer.timeline for answer in self.found[name].answers] for name in alive], precision)

    def rows(self) -> list[LatencyRow]:
        """Return a row per arm of what has been answered so far."""
        by = None if self.plan.judge is None else self.plan.judge.name
        return [
            row_of_arm(arm, self.found[arm.name], self.plan.asked(arm.name), self.session, judged_by=by)
            for arm in self.plan.arms
        ]

    def look_around(self) -> None:
        """Read clocks and throttling while the device is still warm from the rounds."""
        for found, environment in self._once_an_engine(lambda engine: engine.environment()):
            found.facts = replace(found.facts, environment=environment)

    def prove(self) -> None:
        for name in self._alive(list(self.arms)):
            try:
                self.found[name].evidence = self.engines[name].prove(
                    self.plan.asked(name).batch(0), self.arms[name].options
                )
            except OutOfMemoryError:  # the timed rounds fitted; the same without compilation does not
                continue

    def probe_hardware(self) -> None:
        for found, hardware in self._once_an_engine(lambda engine: engine.probe_hardware()):
            found.hardware = hardware

    def _once_an_engine(self, asked: Callable[[Engine], _Found]) -> Iterator[tuple[Measured, _Found]]:
        """Ask each engine once; yields what it answered for every arm that is left and uses it."""
        known: dict[int, _Found] = {}
        for name in self._alive(list(self.arms)):
            engine = self.engines[name]
            if id(engine) not in known:
                known[id(engine)] = asked(engine)
            yield self.found[name], known[id(engine)]
