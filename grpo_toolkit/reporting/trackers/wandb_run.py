"""Latency in Weights & Biases, in the run that the trainer opened.

What was learnt by trying (wandb 0.31): never pass `step=` (an older step is dropped with a warning), so every row
carries `train/global_step`; define metrics by exact name, because overlapping globs are resolved at random; log
scalars first, media next and tables last, because only tables and artifacts wait for the server.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST
from grpo_toolkit.checkpoint.manifest import sha256
from grpo_toolkit.latency.rows.review import key_part, visits_of
from grpo_toolkit.reporting.report.folder_findings import export_manifest, findings_of
from grpo_toolkit.reporting.report.headline import headline_of
from grpo_toolkit.reporting.report.screen_lines import fault_count
from grpo_toolkit.reporting.trackers.metrics import (
    BEST,
    HEADLINES,
    IDS_KEY,
    REPORT_KEY,
    STEP_METRIC,
    TABLE_IDS_KEY,
    TABLE_KEY,
    joined,
    scalars,
    table,
)
from grpo_toolkit.reporting.trackers.wandb_plots import box_plots, tpot_bars, tpot_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_toolkit.latency.rows.review import Review, Visit
    from grpo_toolkit.reporting.report.page import Pages
    from grpo_toolkit.reporting.trackers.bounded_calls import Breaker

CHART_KEY: Final = "latency/charts"


def active_run() -> Any | None:
    """Return the run that is open in this process, or None. Never starts or imports W&B."""
    module = sys.modules.get("wandb")
    return None if module is None else module.run


def logged_ids(run: Any, key: str) -> set[str]:
    """Return the ids of the rows that a run has: of this process, or of before where the run was resumed."""
    return set(str(run.summary.get(key) or "").split())


def log_review(
    run: Any,
    review: Review,
    pages: Pages,
    breaker: Breaker,
    *,
    known: set[str],
    known_in_table: set[str],
    artifact: bool = False,
) -> int:
    """Mirror what a run does not have yet: scalars first, media next, tables and the artifact last.

    Args:
        run: an open W&B run.
        review: all rows.
        pages: the report and pictures to log with them.
        breaker: bounds every call and remembers what failed.
        known, known_in_table: ids that the run has already; what was sent is added.
        artifact: also record the export as an artifact, by reference.

    Returns:
        How many exports' scalars were sent.
    """
    sent = log_scalars(run, review, breaker, known=known)
    every = {row.id for row in review.rows} | {row.id for row in review.explanations}
    if not every or every <= known_in_table:
        return sent
    step = max((visit.step for visit in visits_of(review)), default=0)
    breaker.call("scalars", partial(_describe, run, review))
    for make in _media(review, pages):
        breaker.call("media", partial(_log_made, run, make, step))
    is_whole = all(breaker.call("tables", partial(_log_made, run, make, step)) for make in _tables(review, every))
    if is_whole:
        known_in_table |= every
    if artifact:
        breaker.call("artifacts", lambda: _log_artifact(run, review, step))
    return sent


def _log_made(run: Any, make: Callable[[], dict[str, Any]], step: int) -> None:
    run.log({**make(), STEP_METRIC: step})


def log_scalars(run: Any, review: Review, breaker: Breaker, *, known: set[str]) -> int:
    """Log a row per visit with what the run does not have yet; adds to `known`, returns how many were sent."""
    sent = 0
    for visit in visits_of(review):
        if set(visit.ids) <= known:
            continue
        if breaker.call("scalars", partial(_log_scalars, run, visit, frozenset(known))):
            known |= set(visit.ids)
            sent += 1
    return sent


def _log_scalars(run: Any, visit: Visit, known: frozenset[str]) -> None:
    values = scalars(visit, known)
    for name in values:
        best = BEST[name.rpartition("/")[2]]
        run.define_metric(name, step_metric=STEP_METRIC, summary=f"{best},last", hidden=name not in HEADLINES)
    run.define_metric(IDS_KEY, step_metric=STEP_METRIC, hidden=True)
    run.log({**values, IDS_KEY: joined(set(known) | set(visit.ids)), STEP_METRIC: visit.step})


def _describe(run: Any, review: Review) -> None:
    """Put what two runs are compared by where W&B's table of runs has its columns: config and summary."""
    found = findings_of(review)
    headline = headline_of(review)
    if headline is not None:
        run.summary["latency/headline"] = headline.figure
        run.summary["latency/verdict"] = headline.verdict or "no interval"
    for row, ratio in review.ratios:
        if row.arm == "export" and ratio.against == "base":
            metric = ratio.metric.removesuffix("_s")
            run.summary[f"latency/export/{metric}_verdict"] = "no interval" if ratio.low is None else ratio.verdict
    for arm in ("checkpoint", "export"):
        if arm in found:
            run.summary[f"latency/{arm}/faults"] = fault_count(found[arm])
    facts: dict[str, Any] = {"version": metadata.version("grpo-toolkit")}
    if review.arms:
        row = review.arms[0]
        facts["hardware"] = row.environment.get("hardware", row.settings.device)
        facts["workload"] = f"{row.workload.max_new_tokens} new tokens after {row.workload.prompt_tokens}"
    if "checkpoint" in found:
        facts["trained"] = "adapter" if found["checkpoint"].get("kind") == "adapter" else "full"
    run.config.update({f"grpo_toolkit/{name}": value for name, value in facts.items()}, allow_val_change=True)


def _media(review: Review, pages: Pages) -> list[Any]:
    """Return makers of what W&B queues without asking the server; each is called only when its turn comes."""
    import wandb

    found = []
    if pages.report is not None:
        report = pages.report
        found.append(lambda: {REPORT_KEY: wandb.Html(report.read_text(encoding="utf-8"), inject=False)})
    if pages.pictures:
        pictures = dict(pages.pictures)
        found.append(lambda: {f"{CHART_KEY}/{name}": wandb.Image(str(path)) for name, path in pictures.items()})
    found.append(lambda: {f"latency/box/{name}": wandb.Plotly(plot) for name, plot in box_plots(review).items()})
    return found


def _tables(review: Review, every: set[str]) -> list[Any]:
    import wandb

    columns, data = table(review.rows)
    return [
        lambda: tpot_bars(review),
        lambda: tpot_lines(review),
        lambda: {
            TABLE_KEY: wandb.Table(columns=columns, data=data, allow_mixed_types=True),
            TABLE_IDS_KEY: joined(every),
        },
    ]


def _log_artifact(run: Any, review: Review, step: int) -> None:
    """Log the newest export as a reference: nothing is copied, and no file is read but the manifest."""
    import wandb

    export = next((row for row in review.arms if row.arm == "export"), None)
    if export is None or not Path(export.path).is_dir():
        return
    folder = Path(export.path).resolve()
    manifest = export_manifest(review)
    newest = next((scalars(visit) for visit in reversed(visits_of(review)) if visit.main == review.arms), {})
    facts = {
        "step": step,
        "path": str(folder),
        "base": None if manifest is None else manifest.get("base"),
        "put_right": [] if manifest is None else manifest.get("put_right"),
        "findings": [finding["code"] for finding in findings_of(review).get("export", {}).get("findings", [])],
        "manifest_sha256": sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else None,
        "latency": {name: value for name, value in newest.items() if "/export/" in name},
    }
    artifact = wandb.Artifact(f"export-{key_part(run.id)}", type="model", metadata=facts)
    artifact.add_reference(folder.as_uri(), checksum=False)
    aliases = [f"step-{step}"] + (["best"] if _is_best(review) else [])
    run.log_artifact(artifact, aliases=aliases)


def _is_best(review: Review) -> bool:
    """Return whether no export that was measured before decodes faster than the newest."""
    visits = visits_of(review)
    times = [
        row.tpot_s.median for visit in visits for row in visit.main if row.arm == "export" and row.tpot_s is not None
    ]
    return bool(times) and times[-1] <= min(times)


def run_facts(run: Any) -> dict[str, Any]:
    """Return what finds the run again: entity, project, id, mode, folder."""
    settings = run.settings
    return {
        "entity": run.entity or None,
        "project": run.project or None,
        "id": run.id,
        "name": run.name,
        "mode": "offline" if settings.mode in ("offline", "dryrun") else str(settings.mode),
        "folder": str(Path(run.dir).parent),
        "url": run.url,
    }
