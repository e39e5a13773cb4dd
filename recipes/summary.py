"""The last thing the recipe prints: what was learnt, what was proven, how fast the result is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit import ExportResult, LatencyRow

WINDOW = 10
"""Logged steps averaged for a reward "before" and "after": one step's mean over a few prompts is mostly noise."""


def reward_change(log_history: Sequence[dict[str, Any]], reward: str) -> tuple[float, float] | None:
    """Mean of a reward over the first and the last `WINDOW` logged steps, or None where it was not logged."""
    values = [entry[f"rewards/{reward}/mean"] for entry in log_history if f"rewards/{reward}/mean" in entry]
    if not values:
        return None
    window = min(WINDOW, max(1, len(values) // 2))
    return sum(values[:window]) / window, sum(values[-window:]) / window


def print_summary(
    log_history: Sequence[dict[str, Any]],
    accuracies: tuple[float, ...],
    export: ExportResult | None,
    rows: Sequence[LatencyRow],
) -> None:
    """One table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GRPO run", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("held-out accuracy", *(f"{accuracy:.1%}" for accuracy in accuracies))
    for reward in ("accuracy_reward", "format_reward"):
        change = reward_change(log_history, reward)
        if change is not None:
            table.add_row(f"{reward}, mean in rollouts", *(f"{value:.2f}" for value in change))
    tpots = {row.arm: row.tpot_s.median * 1e3 for row in rows if row.tpot_s is not None}
    if "base" in tpots and "export" in tpots:
        table.add_row("time per output token", f"{tpots['base']:.2f} ms", f"{tpots['export']:.2f} ms")
    if "export" in tpots and "export_no_cache" in tpots:
        worth = tpots["export_no_cache"] / tpots["export"]
        table.add_row("  the same export, cache off", "", f"{tpots['export_no_cache']:.2f} ms ({worth:.1f}x)")
    if export is not None:
        table.add_row("put right in the export", "", str(len(export.repairs)) if export.repairs else "base was clean")
        proven = export.verification is not None and export.verification.passed
        table.add_row("export", "", "verified" if proven else "not verified")
    Console().print(table)
    if export is not None:
        print(f"export: {export.path}")
    else:
        print("export: none was published; see the error above")
