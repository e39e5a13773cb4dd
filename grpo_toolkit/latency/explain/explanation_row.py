"""The row of an explanation, built from timed arms: effects of causes, the exact split, predictions."""

from __future__ import annotations

import statistics
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.latency.explain.causes import BY_NAME, blanks
from grpo_toolkit.latency.explain.effects import Arm, interval_of, resampled_medians, shares
from grpo_toolkit.latency.explain.exact_split import median_round, split_exactly
from grpo_toolkit.latency.explain.facts import Facts, mean
from grpo_toolkit.latency.explain.physics import Machine, predicted_effects
from grpo_toolkit.latency.rows.row import Effect, ExplanationRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.latency.engines.pool import Source
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.rows.timeline import Timeline

BASE: Final = "base"
UNEXPLAINED: Final = "unexplained"


@dataclass(frozen=True, kw_only=True)
class TimedArm:
    """An arm of an explanation: a model, how it runs, and how many tokens each answer has."""

    name: str
    source: Source
    options: Options
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arms that are timed, and the causes behind them."""

    sources: tuple[Source, Source]
    known: Facts
    seen: Facts
    found: Mapping[str, str]
    toggled: tuple[str, ...]
    arms: Mapping[Arm | str, TimedArm]


def row_of(
    plan: Plan,
    times: Mapping[Arm | str, list[list[Timeline]]],
    hardware: Mapping[str, float],
    environment: dict[str, str],
) -> ExplanationRow:
    everything: Arm = frozenset(plan.toggled)
    chosen = {key: [median_round(rounds) for rounds in lines] for key, lines in times.items()}
    values = {key: statistics.fmean(line.e2e_s for line in lines) for key, lines in chosen.items()}
    seconds = _seconds(times)
    rounds = seconds.shape[1]
    samples = dict(zip(times, resampled_medians(seconds), strict=True))
    effects = shares(plan.toggled, {arm: value for arm, value in values.items() if not isinstance(arm, str)})
    spreads = shares(plan.toggled, {arm: value for arm, value in samples.items() if not isinstance(arm, str)})
    predicted = _predicted(plan, values, chosen, hardware)
    toggled = [
        _effect(plan, name, effects[name], interval_of(spreads[name], rounds=rounds), predicted.get(name))
        for name in plan.toggled
    ]
    left, spread = values[frozenset()] - values[BASE], samples[frozenset()] - samples[BASE]
    low, high = interval_of(spread, rounds=rounds) or (None, None)
    least, most = interval_of(samples[everything] - samples[BASE], rounds=rounds) or (None, None)
    toggled.sort(key=lambda effect: -abs(effect.effect_s))
    rest = Effect(layer="unexplained", cause=UNEXPLAINED, effect_s=left, low_s=low, high_s=high)
    measured = {effect.cause: effect for effect in toggled}
    return ExplanationRow(
        base=plan.sources[0].name,
        trained=plan.sources[1].name,
        metric="e2e_s",
        base_s=values[BASE],
        trained_s=values[everything],
        low_s=least,
        high_s=most,
        audit=[measured.get(name) or _effect(plan, name, 0.0, None, None) for name in plan.found],
        split=split_exactly(chosen[BASE], chosen[everything]),
        effects=[*toggled, rest],
        environment=environment,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        session=uuid.uuid4().hex,
    )


def _seconds(times: Mapping[Arm | str, list[list[Timeline]]]) -> Any:
    """Return E2E as an array of shape (arms, rounds, requests)."""
    import numpy as np

    return np.array([[[line.e2e_s for line in rounds] for rounds in lines] for lines in times.values()]).swapaxes(1, 2)


def _effect(
    plan: Plan, name: str, seconds: float, interval: tuple[float, float] | None, predicted: float | None
) -> Effect:
    cause = BY_NAME[name]
    low, high = interval or (None, None)
    return Effect(
        layer="toggled",
        cause=name,
        effect_s=seconds,
        low_s=low,
        high_s=high,
        predicted_s=predicted,
        evidence=plan.found[name],
        cure=cause.cure,
        command=cause.command.format(**blanks(plan.known, plan.seen)),
    )


def _predicted(
    plan: Plan,
    values: Mapping[Arm | str, float],
    chosen: Mapping[Arm | str, list[Timeline]],
    hardware: Mapping[str, float],
) -> dict[str, float]:
    if not hardware:
        return {}
    lines = chosen[BASE]
    machine = Machine(
        bandwidth=hardware["bandwidth_bytes_per_s"],
        flops=hardware["flops_per_s"],
        overlaps=plan.known.options.device.startswith("cuda"),
        base_ttft_s=statistics.fmean(line.ttft_s for line in lines),
        base_tpot_s=statistics.fmean(line.tpot_s or 0.0 for line in lines),
    )
    tokens = {key: mean(arm.tokens) for key, arm in plan.arms.items() if not isinstance(key, str)}
    return predicted_effects(plan.toggled, plan.known, plan.seen, tokens, machine)
