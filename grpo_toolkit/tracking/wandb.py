"""Latency in Weights & Biases, in the run that the trainer opened.

What was learnt by trying (wandb 0.31): never pass `step=` (an older step is dropped with a warning), so every row
carries `train/global_step`; define metrics by exact name, because overlapping globs are resolved at random; log
scalars first and the table last, because only tables can block; a `Table` made offline is kept in a staging folder
outside the run's folder unless `allow_offline_artifacts` is off.
"""

from __future__ import annotations

import logging
import netrc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.row import LatencyRow, Summary

logger = logging.getLogger(__name__)

STEP_METRIC: Final = "train/global_step"
TABLE_KEY: Final = "latency/table"
TABLE_COLUMNS: Final = (
    "step",
    "arm",
    "use_cache",
    "prompt_tokens",
    "new_tokens",
    "rounds",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "e2e_ms_p50",
    "output_tokens_per_s_p50",
    "peak_memory_mb",
    "kv_cache_in_use",
    "vision_calls",
    "dtype",
    "device",
)


def prepare_environment(output_dir: str | os.PathLike[str]) -> None:
    """Before W&B starts: files inside `output_dir`, offline where there is no key. A variable already set wins.

    Without a key and a terminal, `wandb.init` would stop and ask, or fail.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
    if not _has_key():
        os.environ.setdefault("WANDB_MODE", "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def active_run() -> Any | None:
    """The run that is open in this process, or None. Never starts or imports W&B."""
    module = sys.modules.get("wandb")
    return None if module is None else module.run


def scalars(rows: Sequence[LatencyRow]) -> dict[str, float]:
    """`latency/<arm>/<metric>` for every arm; milliseconds and megabytes, as charts want them."""
    values: dict[str, float | None] = {}
    for row in rows:
        prefix = f"latency/{row.arm}"
        values[f"{prefix}/ttft_ms_p50"] = _median(row.ttft_s, 1e3)
        values[f"{prefix}/tpot_ms_p50"] = _median(row.tpot_s, 1e3)
        values[f"{prefix}/e2e_ms_p50"] = _median(row.e2e_s, 1e3)
        values[f"{prefix}/output_tokens_per_s_p50"] = _median(row.output_tokens_per_s)
        values[f"{prefix}/peak_memory_mb"] = _megabytes(row.memory.peak_bytes)
    return {name: value for name, value in values.items() if value is not None}


def _median(summary: Summary | None, factor: float = 1.0) -> float | None:
    return None if summary is None else summary.median * factor


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def table_rows(rows: Sequence[LatencyRow], step: int) -> list[list[Any]]:
    """One line per arm, in the order of `TABLE_COLUMNS`."""
    return [
        [
            step,
            row.arm,
            "as in the files" if row.settings.use_cache is None else str(row.settings.use_cache).lower(),
            row.workload.prompt_tokens,
            row.workload.max_new_tokens,
            row.rounds,
            _median(row.ttft_s, 1e3),
            _median(row.tpot_s, 1e3),
            _median(row.e2e_s, 1e3),
            _median(row.output_tokens_per_s),
            _megabytes(row.memory.peak_bytes),
            row.proof.is_cached,
            row.proof.vision_calls,
            row.settings.dtype,
            row.settings.device,
        ]
        for row in rows
    ]


def log_latency(rows: Sequence[LatencyRow], *, step: int) -> bool:
    """Mirror rows into the open run; False where there is none or it failed (said once, training goes on)."""
    run = active_run()
    if run is None:
        return False
    import wandb

    try:
        values = scalars(rows)
        for name in values:
            run.define_metric(name, step_metric=STEP_METRIC)
        run.log({**values, STEP_METRIC: step})
        table = wandb.Table(columns=list(TABLE_COLUMNS), data=table_rows(rows, step))
        run.log({TABLE_KEY: table, STEP_METRIC: step})
    except Exception as error:  # a tracker must never hurt a training run, whatever it raises
        logger.warning("W&B did not take the latency rows (%s: %s); they are on disk", type(error).__name__, error)
        return False
    return True


def run_folder() -> tuple[Path, bool]:
    """The open run's folder, and whether the run is offline and can be uploaded later.

    Raises:
        LookupError: no run is open.
    """
    run = active_run()
    if run is None:
        raise LookupError("no W&B run is open in this process")
    return Path(run.dir).parent, bool(run.settings.mode == "offline")
