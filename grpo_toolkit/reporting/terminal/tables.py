"""Tables for a terminal: latency, exports, merges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.latency.bench.statistics import span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from grpo_toolkit.export.export_result import ExportResult
    from grpo_toolkit.latency.rows.row import LatencyRow, Summary
    from grpo_toolkit.merge.merge import MergeResult


def latency_table(rows: Sequence[LatencyRow]) -> Table:
    """Return rows as a table: medians, quartiles in brackets."""
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first.workload.name}: {'up to ' if first.workload.kind == 'natural' else ''}"
        f"{first.workload.max_new_tokens} new tokens after {first.workload.prompt_tokens}, batch "
        f"{first.workload.batch_size}; medians over {first.rounds} rounds, quartiles in brackets; "
        f"{first.environment.get('hardware', '?')}",
        title_justify="left",
    )
    table.add_column("arm", no_wrap=True)
    for name in ("TTFT ms", "TPOT ms", "E2E ms", "tokens/s", "peak MB", "KV cache", "vision runs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            table.add_row(row.arm, row.error)
            continue
        table.add_row(
            row.arm,
            _milliseconds(row.ttft_s, 1),
            "-" if row.tpot_s is None else _with_quartiles(row.tpot_s),
            _milliseconds(row.e2e_s, 0),
            "-" if row.output_tokens_per_s is None else f"{row.output_tokens_per_s.median:.0f}",
            "-" if row.memory.peak_bytes is None else f"{row.memory.peak_bytes / 1e6:.0f}",
            {None: "-", True: "in use", False: "off"}[row.proof.is_cached],
            "-" if row.proof.vision_calls is None else str(row.proof.vision_calls),
        )
    return table


def ratio_lines(rows: Sequence[LatencyRow]) -> list[str]:
    """Return the ratios in words, a line per arm and metric: TPOT, TTFT, E2E over the first arm's; what is missing."""
    names = {"tpot_s": "TPOT", "ttft_s": "TTFT", "e2e_s": "E2E"}
    lines = []
    for row in rows:
        for ratio in row.ratios:
            what = f"{row.arm} / {ratio.against}, {names.get(ratio.metric, ratio.metric)}"
            left_out = f", {ratio.left_out} left out" if ratio.left_out else ""
            lines.append(
                f"{what}: {ratio.median:.3f} ({span(ratio)}, {_rounds(ratio.pairs)}{left_out}): {ratio.verdict}"
            )
    return lines + at_once_lines(rows)


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"


def at_once_lines(rows: Sequence[LatencyRow]) -> list[str]:
    """Return a line for each arm with answers that have no TPOT, and one for the ratios that are missing for it."""
    lines = []
    late = [row for row in rows if row.tokens is not None and row.tokens.at_once]
    for row in late:
        assert row.tokens is not None
        lines.append(
            f"{row.arm}: in {row.tokens.at_once} of {row.rounds} rounds the answer arrived at once; "
            "those have no TPOT, and their TTFT says nothing"
        )
    lost = [row.arm for row in rows if row.ratios and all(ratio.metric != "tpot_s" for ratio in row.ratios)]
    return lines + ([f"no ratio of TPOTs for {', '.join(lost)}: too few rounds have both"] if late and lost else [])


def _milliseconds(summary: Summary | None, digits: int) -> str:
    return "-" if summary is None else f"{summary.median * 1e3:.{digits}f}"


def _with_quartiles(spread: Summary) -> str:
    return f"{spread.median * 1e3:.2f} ({spread.q1 * 1e3:.2f} - {spread.q3 * 1e3:.2f})"


def export_table(result: ExportResult) -> Table:
    """Return what went into an export, what was put right, what was proven about it, and where it is."""
    from rich.text import Text

    table = _facts_table(f"Export {result.path}")
    for name, value in result.sources.items():
        table.add_row(name, Text(str(value)))
    _add_mends(table, result)
    table.add_row("changed in training", Text("\n".join(map(str, result.changes)) or "weights alone"))
    if result.verification is None:
        table.add_row("proven", Text("nothing: verification was switched off"))
    for check in result.verification.checks if result.verification else ():
        verdict = "skipped: " if check.skipped else "ok: " if check.passed else "FAILED: "
        table.add_row(check.name, Text(verdict + check.detail))
    table.add_row("published", Text(_published(result)))
    return table


def merge_table(result: MergeResult) -> Table:
    """Return what was merged into what, how many tensors it reached, what was put right, and where it is."""
    from rich.text import Text

    table = _facts_table(f"Merge {result.path}")
    table.add_row("base", Text(str(result.base)))
    table.add_row("adapter", Text(str(result.adapter)))
    table.add_row("changed", f"{len(result.changed)} tensors")
    if result.unchanged:
        table.add_row("reached and unchanged", f"{len(result.unchanged)} tensors")
    table.add_row("copied", f"{result.copied} tensors")
    _add_mends(table, result)
    table.add_row("published", Text(_published(result)))
    return table


def _facts_table(title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("figure")
    return table


def _add_mends(table: Table, result: ExportResult | MergeResult) -> None:
    from rich.text import Text

    nothing = "nothing" if result.base is None else "nothing: the base was clean"
    table.add_row("put right", Text("\n".join(map(str, result.repairs)) or nothing))
    if result.made_portable:
        table.add_row("for older versions", Text("\n".join(result.made_portable)))


def _published(result: ExportResult | MergeResult) -> str:
    return f"{result.path}, {result.bytes / 1e9:.2f} GB in {result.seconds:.1f} s"
