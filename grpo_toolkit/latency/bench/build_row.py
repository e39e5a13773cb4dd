"""The row of `latency.jsonl` that is built from an arm's answers."""

from __future__ import annotations

import statistics
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from grpo_toolkit.latency.bench.roofline import roofline_of
from grpo_toolkit.latency.bench.statistics import summary
from grpo_toolkit.latency.rows.row import LatencyRow, Memory, Phases, Proof, Settings, Summary, Tokens, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Measured


def row_of_arm(arm: Arm, found: Measured, traffic: Traffic, session: str) -> LatencyRow:
    """Return the row of one arm; after an error without its times, which are of fewer rounds than the others'."""
    timelines = [] if found.error else [answer.timeline for answer in found.answers]
    row_roofline = None if found.error else roofline_of(found, batch_size=traffic.batch_size)
    return LatencyRow(
        arm=arm.name,
        path=arm.place,
        settings=_settings(arm, found.facts),
        workload=_workload(traffic, found.answers),
        rounds=len(timelines),
        ttft_s=_summary(timeline.ttft_s for timeline in timelines),
        tpot_s=_summary(timeline.tpot_s for timeline in timelines),
        e2e_s=_summary(timeline.e2e_s for timeline in timelines),
        first_answer_s=_summary(timeline.first_answer_s for timeline in timelines),
        output_tokens_per_s=_summary(timeline.output_tokens / timeline.e2e_s for timeline in timelines),
        phases=Phases(**{name: _summary(t.phases_s.get(name) for t in timelines) for name in _PHASES}),
        tokens=_tokens(found.answers) if timelines else None,
        memory=_memory(found, traffic.batch_size),
        proof=found.evidence.proof if found.evidence is not None else Proof(),
        roofline=row_roofline,
        warmup_s=found.warmup_s,
        parameters=found.facts.parameters,
        environment=found.facts.environment,
        timelines=timelines,
        error=found.error,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        session=session,
    )


_PHASES = ("tokenize_s", "image_s", "transfer_s", "vision_s", "prefill_s", "decode_s", "detokenize_s")


def _settings(arm: Arm, facts: EngineFacts) -> Settings:
    options = replace(arm.options, device=facts.device or arm.options.device)
    if arm.url is not None:
        return Settings(engine="openai", device="", dtype="", sample=options.sample)
    return Settings(
        device=options.device,
        dtype=facts.dtype or options.dtype or "",
        use_cache=options.use_cache,
        cache_implementation=options.cache_implementation,
        attn_implementation=facts.attn_implementation or options.attn_implementation,
        sdpa_backend=options.sdpa_backend,
        compiled=options.is_compiled,
        ahead=options.ahead,
        packed_vision=options.packed_vision,
        device_map=options.device_map,
        eos_token_ids=None if options.eos_token_ids is None else list(options.eos_token_ids),
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        training=options.training,
        sample=options.sample,
    )


def _workload(traffic: Traffic, answers: list[Answer]) -> Workload:
    timelines = [answer.timeline for answer in answers]
    images = [timeline.image_tokens for timeline in timelines if timeline.image_tokens is not None]
    return Workload(
        name=traffic.name,
        kind=traffic.kind,
        batch_size=traffic.batch_size,
        requests=len(timelines) * traffic.batch_size,
        prompt_tokens=int(statistics.median(t.prompt_tokens for t in timelines)) if timelines else 0,
        image_tokens=int(statistics.median(images)) if images else None,
        max_new_tokens=traffic.max_new_tokens,
        thinking=traffic.thinking,
        seed=traffic.seed,
        lengths=traffic.lengths,
    )


def _tokens(answers: list[Answer]) -> Tokens:
    timelines = [answer.timeline for answer in answers]
    lengths = [count for t in timelines for count in (t.output_lengths or [t.output_tokens])]
    return Tokens(
        output=summary([float(count) for count in lengths]),
        think=_summary(t.think_tokens for t in timelines),
        answer=_summary(t.answer_tokens for t in timelines),
        capped=sum(bool(t.is_capped) for t in timelines),
        at_once=sum(t.is_at_once for t in timelines),
    )


def _memory(found: Measured, batch_size: int) -> Memory:
    sizes = found.facts.sizes
    timelines = [answer.timeline for answer in found.answers]
    # The last token is never fed back, so its keys and values are never made.
    longest = max((t.prompt_tokens + max(t.output_lengths or [t.output_tokens]) - 1 for t in timelines), default=0)
    return Memory(
        weights_bytes=None if sizes is None else sizes.weights_bytes,
        kv_theory_bytes=sizes.kv_bytes_per_token * longest * batch_size if sizes and longest else None,
        kv_bytes=None if found.evidence is None else found.evidence.kv_bytes,
        peak_allocated_bytes=_most(answer.peak_allocated_bytes for answer in found.answers),
        peak_reserved_bytes=_most(answer.peak_reserved_bytes for answer in found.answers),
        peak_resident_bytes=_most(answer.peak_resident_bytes for answer in found.answers),
    )


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _summary(values: Iterable[float | None]) -> Summary | None:
    there = [value for value in values if value is not None]
    return summary(there) if there else None
