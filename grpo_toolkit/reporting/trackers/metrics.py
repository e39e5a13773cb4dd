"""The metrics for trackers: names, units and directions of the scalars, and the lines of the one table.

`latency/<arm>/<metric>`, milliseconds and megabytes as charts want them, on the axis `train/global_step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_toolkit.latency.bench.batches import batches_of_rows
from grpo_toolkit.latency.bench.thinking import subject_of, thinking_in
from grpo_toolkit.latency.rows.review import key_part, median_of
from grpo_toolkit.reporting.terminal.two_questions import batch_sentence, thinking_sentence

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from grpo_toolkit.latency.rows.review import Visit
    from grpo_toolkit.latency.rows.row import LatencyRow

STEP_METRIC: Final = "train/global_step"
TABLE_KEY: Final = "latency/table"
REPORT_KEY: Final = "latency/report"
IDS_KEY: Final = "latency/row_ids"
TABLE_IDS_KEY: Final = "latency/table_row_ids"
"""The rows that a tracker has: the ids so far, with the scalars and with the table, as a replay asks for them."""

BEST: Final[dict[str, Literal["min", "max"]]] = {
    "ttft_ms_p50": "min",
    "tpot_ms_p50": "min",
    "e2e_ms_p50": "min",
    "first_answer_ms_p50": "min",
    "output_tokens_per_s_p50": "max",
    "output_tokens_p50": "min",
    "peak_memory_mb": "min",
    "mbu": "max",
    "kv_cache_in_use": "min",
    "tpot_vs_base": "min",
    "tpot_vs_base_low": "min",
    "tpot_vs_base_high": "min",
    "natural_e2e_ms_p50": "min",
    "natural_output_tokens_p50": "min",
}
"""Every metric, and which value of it is the best in a summary (of `kv_cache_in_use`, 1 or 0, the worst)."""

HEADLINES: Final = frozenset(
    {
        "latency/base/tpot_ms_p50",
        "latency/export/tpot_ms_p50",
        "latency/export/tpot_vs_base",
        "latency/export/ttft_ms_p50",
        "latency/export/natural_e2e_ms_p50",
    }
)
"""The scalars that get a panel of their own; the others are there for whoever looks for them and for workspaces."""

_TABLE_MEDIANS: Final = ("ttft_ms_p50", "tpot_ms_p50", "e2e_ms_p50", "output_tokens_per_s_p50", "peak_memory_mb")


def scalars(visit: Visit, known: Collection[str] = ()) -> dict[str, float]:
    """Return the figures of one visit by key, without rows that are `known` (ids); what was not measured is left out.

    `natural_*` are of the workload that ends where the model ends it, all others of exact lengths.
    """
    values: dict[str, float | None] = {}
    for row in visit.arms:
        if row.id not in known:
            prefix = f"latency/{key_part(row.arm)}"
            values |= {f"{prefix}/{name}": value for name, value in _of_row(row).items()}
    for row in visit.natural:
        if row.id not in known and row.tokens is not None:
            prefix = f"latency/{key_part(row.arm)}/natural"
            values[f"{prefix}_e2e_ms_p50"] = median_of(row.e2e_s, 1e3)
            values[f"{prefix}_output_tokens_p50"] = row.tokens.output.median
    return {name: value for name, value in values.items() if value is not None}


def _of_row(row: LatencyRow) -> dict[str, float | None]:
    ratio = next((r for r in row.ratios if (r.against, r.metric) == ("base", "tpot_s")), None)
    peak = row.memory.peak_bytes
    return {
        "ttft_ms_p50": median_of(row.ttft_s, 1e3),
        "tpot_ms_p50": median_of(row.tpot_s, 1e3),
        "e2e_ms_p50": median_of(row.e2e_s, 1e3),
        "first_answer_ms_p50": median_of(row.first_answer_s, 1e3),
        "output_tokens_per_s_p50": median_of(row.output_tokens_per_s),
        "output_tokens_p50": None if row.tokens is None else row.tokens.output.median,
        "peak_memory_mb": None if peak is None else peak / 1e6,
        "mbu": None if row.roofline is None else row.roofline.mbu,
        "kv_cache_in_use": None if row.proof.is_cached is None else float(row.proof.is_cached),
        "tpot_vs_base": None if ratio is None else ratio.median,
        "tpot_vs_base_low": None if ratio is None else ratio.low,
        "tpot_vs_base_high": None if ratio is None else ratio.high,
    }


def question_figures(rows: Sequence[LatencyRow]) -> dict[str, str | float]:
    """Return what thinking costs and what a larger batch brings, in words and figures, for a run's summary."""
    values: dict[str, str | float | None] = {}
    thinking, batches = subject_of(thinking_in(rows)), batches_of_rows(rows)
    if thinking is not None:
        values["thinking"] = thinking_sentence(thinking)
        for name, found in {
            "thinking_share": thinking.share or thinking.before_answer,
            "thinking_tokens": thinking.tokens,
            "thinking_s": thinking.seconds,
        }.items():
            if found is not None:
                values |= {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}
        values["thinking_first_answer_s"], values["direct_first_answer_s"] = thinking.first_answer_s
        values["thinking_reward"], values["direct_reward"] = thinking.rewards or (None, None)
    if batches is not None:
        large = batches.points[-1]
        values |= {
            "batches": batch_sentence(batches),
            "batch_size": large.size,
            "batch_tokens_per_s": large.tokens_per_s,
            "batch_tokens_per_s_gain": batches.gain,
            "kv_mb_per_1000_tokens": None if (kv := batches.kv_bytes_per_token) is None else kv / 1e3,
            "sequences_that_fit": batches.fits,
        }
    return {name: value for name, value in values.items() if value is not None}


def table(rows: Sequence[LatencyRow]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of the table, and a line per row of `latency.jsonl` (arm, batch size, cache, step, ...)."""
    lines = [_table_line(row) for row in rows]
    return list(lines[0]) if lines else [], [list(line.values()) for line in lines]


def _table_line(row: LatencyRow) -> dict[str, Any]:
    figures, cache = _of_row(row), row.settings.use_cache
    return {
        "step": row.step,
        "arm": row.arm,
        "workload": row.workload.name,
        "batch_size": row.workload.batch_size,
        "use_cache": "as in the files" if cache is None else str(cache).lower(),
        "cache_implementation": row.settings.cache_implementation,
        "thinking": row.workload.thinking,
        "prompt_tokens": row.workload.prompt_tokens,
        "image_tokens": row.workload.image_tokens,
        "new_tokens": row.workload.max_new_tokens,
        "rounds": row.rounds,
        **{name: figures[name] for name in _TABLE_MEDIANS},
        "kv_cache_in_use": row.proof.is_cached,
        "vision_calls": row.proof.vision_calls,
        "dtype": row.settings.dtype,
        "device": row.settings.device,
        "error": row.error,
        "id": row.id,
    }


def joined(ids: set[str]) -> str:
    """Return ids as one value that every tracker can keep."""
    return " ".join(sorted(ids))
