"""The last thing the recipe prints: what was learnt, what was proven, how fast the result is."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit import ExportResult, LatencyRow, StepExplanation


def reward_change(log_history: Sequence[dict[str, Any]], reward: str) -> tuple[float, float] | None:
    """Return a reward's mean over the first and the last tenth of the logged steps; None where it was not logged."""
    values = [entry[f"rewards/{reward}/mean"] for entry in log_history if f"rewards/{reward}/mean" in entry]
    if not values:
        return None
    window = max(1, len(values) // 10)
    return sum(values[:window]) / window, sum(values[-window:]) / window


def summarise(
    log_history: Sequence[dict[str, Any]],
    accuracies: tuple[float, float],
    export: ExportResult | None,
    rows: Sequence[LatencyRow],
    *,
    cost: dict[str, float | None],
    direct_accuracy: float | None = None,
    begun_with: str | None = None,
    steps: StepExplanation | None = None,
) -> dict[str, Any]:
    """Return the figures of a run, [before, after] where there are two; written to `summary.json` and printed.

    `begun_with` is the checkpoint that the accuracies before are of, where they could not be the base's.
    """
    fixed = {row.arm: row for row in rows if row.tpot_s and row.workload.kind == "fixed"}
    return {
        "held_out_accuracy": list(accuracies),
        "begun_with": begun_with,
        "direct_accuracy": direct_accuracy,
        "accuracy_reward": reward_change(log_history, "accuracy_reward"),
        "iou_reward": reward_change(log_history, "iou_reward"),
        "format_reward": reward_change(log_history, "format_reward"),
        **cost,
        "step_causes": [] if steps is None else [asdict(cause) for cause in steps.causes],
        "step_floor_s": None if steps is None else steps.floor_s,
        "tpot_ms": {arm: row.tpot_s.median * 1e3 for arm, row in fixed.items() if row.tpot_s},
        "tpot_ratios": {
            arm: asdict(ratio)
            for arm, row in fixed.items()
            for ratio in row.ratios
            if (ratio.metric, ratio.against) == ("tpot_s", "base")
        },
        "export": None if export is None else str(export.path),
        "verified": export is not None and export.verification is not None and export.verification.passed,
        "put_right": [] if export is None else [str(repair) for repair in export.repairs],
    }


def with_verdict(tpot_ms: float, ratio: dict[str, Any] | None) -> str:
    """Return a time per token with its verdict: `33.68 ms (slower: 1.20 to 1.39 times the base)`."""
    if ratio is None:
        return f"{tpot_ms:.2f} ms"
    said = "cannot tell apart" if ratio["verdict"] == "cannot tell" else ratio["verdict"]
    return f"{tpot_ms:.2f} ms ({said}: {ratio['low']:.2f} to {ratio['high']:.2f} times the base)"


def print_summary(summary: dict[str, Any]) -> None:
    """Print one table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GRPO run", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    asked = summary["begun_with"] or "the base"
    name = "held-out accuracy" + (f" (before: of {asked}, not of the base)" if summary["begun_with"] else "")
    table.add_row(name, *(f"{accuracy:.1%}" for accuracy in summary["held_out_accuracy"]))
    if summary["direct_accuracy"] is not None:
        table.add_row(f"  {asked}, asked for the answer alone", f"{summary['direct_accuracy']:.1%}", "")
    for reward in ("accuracy_reward", "iou_reward", "format_reward"):
        if summary[reward] is not None:
            table.add_row(f"{reward}, mean in rollouts", *(f"{value:.2f}" for value in summary[reward]))
    if summary["step_s"] is not None:
        table.add_row("time per step, rollouts included", "", f"{summary['step_s']:.2f} s")
    for cause in summary["step_causes"][:1]:
        saving = "" if cause["saving_s"] is None else f", {cause['saving_s']:.2f} s of it"
        table.add_row(f"  slowed down most by {cause['cause']}{saving}", "", f"cure: {cause['line'] or cause['cure']}")
    if summary["peak_gib"] is not None:
        estimated, peak = f"{summary['estimated_gib']:.1f} GiB estimated", f"{summary['peak_gib']:.1f} GiB"
        table.add_row("GPU memory at the peak of training", estimated, peak)
    tpot, ratios = summary["tpot_ms"], summary["tpot_ratios"]
    if {"base", "export"} <= tpot.keys():
        after = with_verdict(tpot["export"], ratios.get("export"))
        table.add_row("time per output token", f"{tpot['base']:.2f} ms", after)
    if {"export", "export_no_cache"} <= tpot.keys():
        without = with_verdict(tpot["export_no_cache"], ratios.get("export_no_cache"))
        table.add_row("  the same export, cache off", "", without)
    table.add_row("put right in the export", "", "\n".join(summary["put_right"]) or "nothing: the base was clean")
    table.add_row("export", "", "verified" if summary["verified"] else "NOT PUBLISHED OR NOT VERIFIED")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"export: {summary['export'] or 'none was published; see the error above'}")
