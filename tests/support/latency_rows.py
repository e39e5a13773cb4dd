"""Rows of the full schema with figures that a reader can check by hand: no clock, the arithmetic is all here."""

from __future__ import annotations

from typing import Any

from grpo_toolkit.latency.bench.statistics import summary
from grpo_toolkit.latency.rows.row import (
    Effect,
    ExplanationRow,
    LatencyRow,
    Memory,
    Phases,
    Proof,
    Ratio,
    Roofline,
    Settings,
    Timeline,
    Tokens,
    Workload,
)

TPOT_S = {"base": 0.020, "checkpoint": 0.036, "export": 0.0196, "export_no_cache": 0.070}
ENVIRONMENT = {"hardware": "a processor", "threads": "1", "torch": "2.15", "transformers": "5.23"}


def wobble(index: int) -> float:
    """Return a number within 3% of one, the same at every call."""
    return 1 + 0.03 * (((index * 7919) % 13) / 6 - 1)


def timeline(tpot_s: float, index: int, *, tokens: int = 48, ttft_s: float = 0.12, grows: bool = False) -> Timeline:
    times, now = [ttft_s * wobble(index)], ttft_s * wobble(index)
    for token in range(1, tokens):
        now += tpot_s * wobble(index * 31 + token) * (0.6 + 0.8 * token / tokens if grows else 1)
        times.append(now)
    shares = {"tokenize_s": 0.01, "image_s": 0.09, "transfer_s": 0.0, "vision_s": 0.3, "prefill_s": 0.6}
    phases = {name: share * times[0] for name, share in shares.items()}
    return Timeline(token_times_s=times, prompt_tokens=256, output_tokens=tokens, image_tokens=64, phases_s=phases)


def row(
    arm: str, *, session: str = "first", step: int | None = 100, batch_size: int = 1, **changes: Any
) -> LatencyRow:
    tpot = TPOT_S.get(arm, 0.02) * (1 + 0.04 * (batch_size - 1))
    timelines = [timeline(tpot, index, grows=arm == "export_no_cache") for index in range(12)]
    tpots = [(t.token_times_s[-1] - t.token_times_s[0]) / 47 for t in timelines]
    fields: dict[str, Any] = {
        "arm": arm,
        "path": f"/models/{arm}",
        "step": step,
        "settings": Settings(device="cpu", dtype="bfloat16", use_cache=False if arm == "export_no_cache" else None),
        "workload": Workload(
            name="fixed", requests=12, prompt_tokens=256, image_tokens=64, max_new_tokens=48, batch_size=batch_size
        ),
        "rounds": 12,
        "ttft_s": summary([t.token_times_s[0] for t in timelines]),
        "tpot_s": summary(tpots),
        "e2e_s": summary([t.token_times_s[-1] for t in timelines]),
        "output_tokens_per_s": summary([48 * batch_size / t.token_times_s[-1] for t in timelines]),
        "tokens": Tokens(output=summary([48.0] * 12)),
        "memory": Memory(peak_allocated_bytes=7_000_000_000 + 250_000_000 * batch_size),
        "proof": Proof(is_cached=arm != "export_no_cache", step_lengths=[256, 1, 1], vision_calls=1),
        "parameters": 3_086_000_000,
        "environment": ENVIRONMENT,
        "timelines": timelines,
        "measured_at": "2026-01-02T03:04:05+00:00",
        "session": session,
        "id": f"{session}-{step}-{arm}-{batch_size}-{changes.pop('tag', '')}",
    }
    if arm == "export":
        fields["ratios"] = [
            Ratio(against="base", metric="tpot_s", median=0.98, low=0.96, high=1.01, pairs=12, verdict="same"),
            Ratio(against="base", metric="ttft_s", median=1.0, low=0.97, high=1.02, pairs=12, verdict="same"),
            Ratio(
                against="checkpoint", metric="tpot_s", median=0.544, low=0.53, high=0.56, pairs=12, verdict="faster"
            ),
        ]
    return LatencyRow(**(fields | changes))


def arms(*, session: str = "first", step: int | None = 100) -> list[LatencyRow]:
    roof = {arm: Roofline(
        bytes_per_step=6_170_000_000, bandwidth_bytes_per_s=4.3e11, floor_tpot_s=0.01435, mbu=0.01435 / TPOT_S[arm],
        prefill_flops=1.6e12, peak_flops_per_s=4.0e13, mfu=0.4, gap_s=TPOT_S[arm] - 0.01435,
    ) for arm in TPOT_S}  # fmt: skip
    phases = Phases(prefill_s=summary([0.1]))
    return [row(arm, session=session, step=step, roofline=roof[arm], phases=phases) for arm in TPOT_S]


def batch_sweep() -> list[LatencyRow]:
    found = [
        row(arm, session="batches", batch_size=size, tag="batch", timelines=[])
        for size in (1, 2, 4, 8, 16)
        for arm in ("base", "export")
    ]
    nothing: dict[str, Any] = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s", "tokens"))
    failed = row("base", session="batches", batch_size=32, error="out of memory", tag="batch", timelines=[], **nothing)
    return [*found, failed]


def image_sweep() -> list[LatencyRow]:
    found = []
    for count in (64, 256, 1024, 4096):
        phases = {"tokenize_s": 0.002, "image_s": 0.004 + 2e-5 * count, "transfer_s": 0.001,
                  "vision_s": 0.01 + 1e-4 * count, "prefill_s": 0.02 + 5e-5 * count}  # fmt: skip
        for arm in ("base", "export"):
            found.append(
                row(
                    arm,
                    session="images",
                    tag=f"image-{count}",
                    timelines=[],
                    ttft_s=summary([sum(phases.values()) * (1.0 if arm == "export" else 1.05)]),
                    phases=Phases(**{name: summary([value]) for name, value in phases.items()}),
                    workload=Workload(
                        name="images", requests=4, prompt_tokens=count + 30, image_tokens=count, max_new_tokens=8
                    ),
                )
            )
    return found


def natural() -> list[LatencyRow]:
    found = []
    for arm, longer in (("base", 1.0), ("export", 1.6)):
        lengths = [int((40 + 17 * index) * longer) for index in range(12)]
        lines = [
            Timeline(
                token_times_s=[0.1, 0.1 + 0.02 * n], prompt_tokens=256, output_tokens=min(n, 256),
                think_tokens=min(n, 256) * 2 // 3, answer_tokens=min(n, 256) // 3, is_capped=n > 256,
            )
            for n in lengths
        ]  # fmt: skip
        capped = sum(n > 256 for n in lengths)
        tokens = Tokens(output=summary([float(t.output_tokens) for t in lines]), capped=capped)
        workload = Workload(
            name="natural", kind="natural", requests=12, prompt_tokens=256, max_new_tokens=256, thinking=True
        )
        found.append(row(arm, session="natural", timelines=lines, tokens=tokens, workload=workload, tag="natural"))
    return found


def explanations() -> list[ExplanationRow]:
    common: dict[str, Any] = {"metric": "tpot_s", "measured_at": "2026-01-02T03:04:06+00:00", "session": "why"}
    there = [
        Effect(layer="toggled", cause="unmerged_adapter", effect_s=0.012, low_s=0.011, high_s=0.013),
        Effect(layer="toggled", cause="float32_weights", effect_s=0.0035, low_s=0.003, high_s=0.004),
        Effect(layer="unexplained", cause="unexplained", effect_s=0.0005),
    ]
    back = [
        Effect(layer="toggled", cause="merged", effect_s=-0.0164, low_s=-0.0170, high_s=-0.0158),
    ]
    return [
        ExplanationRow(
            base="base",
            trained="checkpoint",
            base_s=0.02,
            trained_s=0.036,
            effects=there,
            id="why-1",
            audit=[Effect(layer="toggled", cause="eager_attention", effect_s=0.0, evidence="eager, not sdpa")],
            **common,
        ),
        ExplanationRow(
            base="checkpoint", trained="export", base_s=0.036, trained_s=0.0196, effects=back, id="why-2", **common
        ),
    ]


def everything() -> list[LatencyRow | ExplanationRow]:
    """Return every chart's rows; the newest comparison is that of step 200."""
    return [
        *arms(session="early", step=100), *batch_sweep(), *image_sweep(), *natural(),
        *arms(session="late", step=200), *explanations(),
    ]  # fmt: skip
