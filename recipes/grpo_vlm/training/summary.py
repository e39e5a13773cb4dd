"""The last thing the recipe prints: what was learnt, what was proven, how fast the result is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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
    latency: Path | None = None,
    steps: StepExplanation | None = None,
) -> dict[str, Any]:
    """Return the figures of a run, [before, after] where there are two; written to `summary.json` and printed.

    `begun_with` is the checkpoint that the accuracies before are of, where they could not be the base's; `latency` the
    folder with the report and the doctor's findings.
    """
    fixed = {row.arm: row for row in rows if row.tpot_s and row.workload.name == "fixed"}
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
        "checks": 0 if export is None or export.verification is None else len(export.verification.checks),
        "faults": {} if latency is None else fault_counts(latency / "findings.json"),
        "report": None if latency is None else str(latency / "report.html"),
        "put_right": [] if export is None else [str(repair) for repair in export.repairs],
    }


def with_verdict(tpot_ms: float, ratio: dict[str, Any] | None) -> str:
    """Return a time per token with its verdict: `33.68 ms (slower: 1.20 to 1.39 times the base)`."""
    if ratio is None:
        return f"{tpot_ms:.2f} ms"
    if ratio["low"] is None:
        return f"{tpot_ms:.2f} ms (no interval over {ratio['pairs']} rounds)"
    said = "cannot tell apart" if ratio["verdict"] == "cannot tell" else ratio["verdict"]
    return f"{tpot_ms:.2f} ms ({said}: {ratio['low']:.2f} to {ratio['high']:.2f} times the base)"


def note_in_wandb(before: float, after: float) -> None:
    """Put the accuracies into the summary of the W&B run that is open, by which runs are compared there."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.summary["held_out_accuracy/before"] = before
        run.summary["held_out_accuracy/after"] = after


def fault_counts(findings: Path) -> dict[str, int]:
    """Return how many faults worse than a note the doctor found in each folder that was timed."""
    try:
        found = json.loads(findings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        arm: sum(finding["severity"] != "note" for finding in diagnosis["findings"])
        for arm, diagnosis in found.items()
    }


def story_lines(summary: dict[str, Any]) -> list[str]:
    """Return what was learnt, what was wrong and is right, what is proven, how fast it is, and where to look next."""
    before, after = summary["held_out_accuracy"]
    asked = summary["begun_with"] or "the base"
    lines = ["", f"learnt      {before:.1%} ({asked}) to {after:.1%} of the held-out rows right"]
    if summary["direct_accuracy"] is not None:
        lines.append(f"            {asked}, asked for the answer alone: {summary['direct_accuracy']:.1%}")
    counts = summary["faults"]
    if {"checkpoint", "export"} <= counts.keys():
        plain, export = counts["checkpoint"], counts["export"]
        lines.append(
            f"right       {plain} fault{'' if plain == 1 else 's'} in the plain checkpoint, {export} in the export"
        )
    verified = f"{summary['checks']} checks passed in a fresh process"
    lines.append(f"verified    {verified if summary['verified'] else 'NO: not published, or not verified; see above'}")
    if "export" in summary["tpot_ms"]:
        lines.append(f"speed       {told(summary['tpot_ms']['export'], summary['tpot_ratios'].get('export'))}")
    places = [summary["export"] and f"{summary['export']}/README.md", summary["report"]]
    for label, place in zip(("look next", ""), filter(None, places), strict=False):
        lines.append(f"{label:<12}{place}")
    return lines


def told(tpot_ms: float, ratio: dict[str, Any] | None) -> str:
    """Return one verdict: the ratio where it can be told, otherwise its interval."""
    if ratio is None:
        return f"{tpot_ms:.2f} ms a token"
    if ratio["low"] is None:
        return f"no verdict over {ratio['pairs']} rounds: it takes six"
    reach = f"{ratio['low']:.2f} to {ratio['high']:.2f} times"
    if ratio["verdict"] == "cannot tell":
        return f"{reach} the base's time per token: cannot tell here"
    return f"{ratio['verdict']}: {ratio['median']:.2f} times the base's time per token ({reach})"


def print_summary(summary: dict[str, Any], *, verbose: bool = False) -> None:
    """Print the story of the run on standard output, or (verbose) a table of all its figures."""
    if not verbose:
        print("\n".join(story_lines(summary)))
        return
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
