"""The explanation of a latency: causes found without a clock, an exact split, causes toggled one by one.

    audit -> natural answers (how long they are) -> arms with some causes on, in turns -> split, effects, physics

Answers are made to one length per arm, so that a cause which changes the text does not hide behind another length;
the length itself is a cause of its own. Effects sum to the difference between the trained model and the trained model
with every cause cured; what that one still differs from the base by is printed as unexplained.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, UnsupportedError
from grpo_toolkit.latency.bench.statistics import SAME_WITHIN, turns
from grpo_toolkit.latency.engines.pool import Engines, Source, source_of
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.explain.answer_lengths import Lengths, lengthened, minus, natural_requests
from grpo_toolkit.latency.explain.causes import BY_NAME, CAUSES, Cause
from grpo_toolkit.latency.explain.effects import Arm, arms_of
from grpo_toolkit.latency.explain.explanation_row import BASE, Plan, TimedArm, row_of
from grpo_toolkit.latency.explain.facts import Facts, declared_by, facts_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.rows.row import ExplanationRow, Timeline
    from grpo_toolkit.model.generation.request import Request

LONGER: Final = "longer-answers"
UNMERGED: Final = "unmerged-adapter"
_MOVE_ENDS: Final = ("eos", "training-state")
"""Causes that decide where an answer ends: cured last."""
_NEED_A_COPY: Final = ("device-map", "float32", "attention")
"""Causes of which a live model is cured in a copy."""
_PROOF_TOKENS: Final = 6
_LEAST_ROUNDS: Final = 3


def explain_latency(
    base: str | os.PathLike[str] | torch.nn.Module,
    trained: str | os.PathLike[str] | torch.nn.Module,
    *,
    requests: Sequence[Request] = (),
    processor: Any = None,
    max_new_tokens: int = 128,
    rounds: int = 6,
    device: str = "cpu",
    options: Options | None = None,
    trained_options: Options | None = None,
    isolated: bool = True,
    pool: Engines | None = None,
    budget_s: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExplanationRow:
    """Explain why `trained` takes another time for an answer than `base`.

    Args:
        base: the folder of the base model, or a live model.
        trained: the folder of the trained model or adapter, or a live model in whatever state it is; one that
            accelerate spread over devices is toggled by loading its folder again, so its weights must be as there.
        requests: what is asked, each in every round; made-up text (and for a model that sees, an image) by default.
        processor: of live models.
        max_new_tokens: the most tokens of an answer.
        rounds: how often every arm answers every request; at least 6 for intervals that mean 95%.
        device: where both run.
        options: how the base runs, where that is not as its files say.
        trained_options: the same for the trained model; `options` by default.
        isolated: folders are loaded in processes of their own; else in this one.
        pool: models that are open already; what is opened in it stays open.
        budget_s: begin no further round after this many seconds of timing; three rounds are always made.
        progress: called with the arm's name, the round and the number of rounds.

    Returns:
        The explanation; E2E seconds of one answer, mean over requests of the median over rounds. `top_cause(row)`
        names what to mend first.

    Raises:
        InputError: fewer than one round or token, or a live model without its processor.
        CheckpointError, WorkerError: a folder cannot be read or loaded.
        UnsupportedError: `generate` of a live model fails.
    """
    if rounds < 1 or max_new_tokens < 2:
        raise InputError("explain_latency needs at least one round and two new tokens")
    sources = source_of(base, processor), source_of(trained, processor)
    usual = _as_it_stands(sources[0], replace(options or Options(), device=device))
    with nullcontext(pool) if pool is not None else Engines(isolated=isolated) as opened:
        lab = _Lab(pool=opened, requests=natural_requests(requests, sources, max_new_tokens), progress=progress)
        ours = _as_it_stands(sources[1], replace(trained_options or options or Options(), device=device))
        known, seen = lab.look(sources[0], usual, sources[0].path), lab.look(sources[1], ours, sources[0].path)
        found = {cause.name: what for cause in CAUSES if (what := cause.seen(known, seen)) is not None}
        plan = lab.plan(sources, known, seen, found)
        is_static = known.is_static or seen.is_static
        times = lab.time(plan.arms, rounds=rounds, is_static=is_static, budget_s=budget_s)
        hardware = opened.engine(sources[0], usual).probe_hardware()
        environment = opened.engine(sources[0], usual).facts().environment
    return row_of(plan, times, hardware, environment)


def explain_missed(
    base: str,
    missed: Sequence[Missed],
    *,
    device: str,
    requests: Sequence[Request] = (),
    max_new_tokens: int = 64,
    budget_s: float | None = None,
) -> list[ExplanationRow]:
    """Explain each folder that missed its gate; what is no folder (an endpoint) is left out.

    Args:
        base: the first arm's folder; "" explains nothing.
        missed: what missed the gate.
        device, requests, max_new_tokens, budget_s: as for `explain_latency`.
    """
    if not base or not Path(base).is_dir():
        return []
    folders = dict.fromkeys(miss.path for miss in missed if Path(miss.path).is_dir())
    return [
        explain_latency(
            base, folder, requests=requests, max_new_tokens=max_new_tokens, device=device, budget_s=budget_s
        )
        for folder in folders
    ]


def top_cause(row: ExplanationRow) -> str | None:
    """Return what to repair first; None where nothing was found.

    First comes what makes the text wrong, then the largest effect that is beyond doubt (of too few rounds for an
    interval: the largest), then what was found without a clock although it cost nothing here.
    """
    audited = [effect.cause for effect in row.audit]
    for cause in audited:
        if cause in BY_NAME and BY_NAME[cause].is_wrong:
            return cause
    clear = [
        effect
        for effect in row.effects
        if effect.layer == "toggled"
        and (effect.low_s is None or effect.low_s > 0)
        and effect.effect_s > (SAME_WITHIN - 1) * row.base_s
    ]
    if clear:
        return max(clear, key=lambda effect: effect.effect_s).cause
    return audited[0] if audited else None


def unexplained_share(row: ExplanationRow) -> float:
    """Return the share of the difference without a cause: |unexplained| / |difference|; 0 where there is none."""
    left = next((effect.effect_s for effect in row.effects if effect.layer == "unexplained"), 0.0)
    difference = row.trained_s - row.base_s
    return abs(left / difference) if difference else 0.0


@dataclass(frozen=True, kw_only=True)
class _Lab:
    """The open models, and their requests."""

    pool: Engines
    requests: list[Request]
    progress: Callable[[str, int, int], None] | None

    def look(self, source: Source, options: Options, base: Path | None) -> Facts:
        """Return everything that is known of a model without a clock."""
        engine = self.pool.engine(source, options)
        short = replace(self.requests[0], max_new_tokens=_PROOF_TOKENS, exact=True)
        try:
            evidence = engine.prove([short], options)
            answers = [engine.ask([request], options) for request in self.requests]
        except RuntimeError as error:  # such as a static cache whose checkpointed layers drop it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(
                f"{source.name}: generate fails as the model stands ({reason}), so there is nothing to time; "
                "leave a live model's training state first: with grpo_toolkit.inference_ready(model)"
            ) from error
        return facts_of(source.name, options, declared_by(source, base), engine.facts(), evidence, answers)

    def plan(self, sources: tuple[Source, Source], known: Facts, seen: Facts, found: Mapping[str, str]) -> Plan:
        """Plan the arms: every combination of causes on the trained model, and the base."""
        lengths = self._lengths(sources[1], known, seen, found)
        told = {name: what for name, what in found.items() if name != LONGER or lengths.changed(LONGER)}
        if lengths.changed(LONGER) and LONGER not in told:
            told[LONGER] = "answers would have another length but for what else is wrong"
        found = told
        toggled = tuple(name for name in found if self._can_toggle(sources[1], BY_NAME[name], known))
        arms: dict[Arm | str, TimedArm] = {
            BASE: TimedArm(name=BASE, source=sources[0], options=known.options, tokens=lengths.base)
        }
        for arm in arms_of(toggled):
            arms[arm] = self._arm(arm, toggled, sources[1], known, seen, lengths)
        return Plan(sources=sources, known=known, seen=seen, found=found, toggled=toggled, arms=arms)

    def _lengths(self, trained: Source, known: Facts, seen: Facts, found: Mapping[str, str]) -> Lengths:
        """Measure the lengths of answers and what each cause adds to them, by curing one after the other.

        Some causes move the end of an answer (another end of sequence, wrong text), others change its words by their
        rounding: these are cured first, while nothing ends the answer elsewhere. What is left when all are cured is
        what training changed.
        """
        source, options, lengths, added = trained, seen.options, seen.output_tokens, {}
        for name in sorted(found, key=lambda name: name in _MOVE_ENDS):
            if not self._can_toggle(trained, BY_NAME[name], known) or name == LONGER:
                continue
            source, options = self._cured(name, source, options, known)
            engine = self.pool.engine(source, options)
            answers = [engine.ask([request], options) for request in self.requests]
            cured = tuple(answer.timeline.output_tokens for answer in answers)
            added[name] = minus(lengths, cured)
            lengths = cured
        added[LONGER] = minus(lengths, known.output_tokens)
        return Lengths(base=known.output_tokens, added=added)

    def _cured(self, name: str, source: Source, options: Options, known: Facts) -> tuple[Source, Options]:
        """Return source and options without that cause."""
        cure = BY_NAME[name].options
        if name == UNMERGED:
            source = self.pool.merged(source)
        return source, options if cure is None else cure(options, known)

    def _can_toggle(self, trained: Source, cause: Cause, known: Facts) -> bool:
        if cause.name == "cache-off" and known.recomputes:
            return False  # it is no difference
        if cause.name == UNMERGED:
            return trained.model is None or hasattr(trained.model, "merge_and_unload")
        if trained.is_dispatched and trained.path is None and cause.name in _NEED_A_COPY:
            return False  # accelerate lets nobody move or copy it, and there is no folder to load it from once more
        return cause.options is not None or cause.name == LONGER

    def _arm(
        self, arm: Arm, toggled: tuple[str, ...], source: Source, known: Facts, seen: Facts, lengths: Lengths
    ) -> TimedArm:
        options = seen.options
        for name in toggled:
            if name not in arm:
                source, options = self._cured(name, source, options, known)
        return TimedArm(
            name=" + ".join(sorted(arm)) or "cured", source=source, options=options, tokens=lengths.of(arm)
        )

    def time(
        self, arms: Mapping[Arm | str, TimedArm], *, rounds: int, is_static: bool, budget_s: float | None
    ) -> dict[Arm | str, list[list[Timeline]]]:
        """Time all arms in turns, after one answer each that is not counted.

        Returns:
            Timelines by arm, request and round. With a static cache every answer has a length that was not met before.
        """
        names = {arm.name: key for key, arm in arms.items()}
        times: dict[Arm | str, list[list[Timeline]]] = {key: [[] for _ in self.requests] for key in arms}
        met, started = 0, time.monotonic()
        for round_ in range(-1, rounds):
            if budget_s is not None and round_ >= _LEAST_ROUNDS and time.monotonic() - started > budget_s:
                break
            for name in turns(list(names), max(round_, 0)):
                arm = arms[names[name]]
                engine = self.pool.engine(arm.source, arm.options)
                for index, request in enumerate(self.requests):
                    met += is_static
                    asked = replace(lengthened(request, met), max_new_tokens=arm.tokens[index], exact=True)
                    answer = engine.ask([asked], arm.options)
                    if round_ >= 0:
                        times[names[name]][index].append(answer.timeline)
                if self.progress is not None:
                    self.progress(name, round_, rounds)
        return times


def _as_it_stands(source: Source, options: Options) -> Options:
    """Return options that spell out what the files or a live model's state say: only that can be toggled."""
    declared = declared_by(source, None)
    cache = options.cache_implementation or declared.cache_implementation
    if source.is_dispatched and options.device_map is None:
        options = replace(options, device_map="as dispatched")
    return replace(options, cache_implementation=cache, training=options.training or declared.is_training)
