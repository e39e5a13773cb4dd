"""The lines that callbacks print at the end of a training: few lines, aligned, for a terminal of 80 columns.

The whole of it is in the report, the export's page and its manifest; these lines say the result and where to look.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.bench.batches import batches_of_rows
from grpo_toolkit.latency.bench.thinking import subject_of, thinking_in
from grpo_toolkit.latency.rows.review import is_swept, median_of
from grpo_toolkit.reporting.charts.style import label_of
from grpo_toolkit.reporting.report.headline import headline_of
from grpo_toolkit.reporting.terminal.tables import at_once_lines
from grpo_toolkit.reporting.terminal.two_questions import batch_parts, thinking_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from grpo_toolkit.export.export_result import ExportResult
    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow, Ratio

_LABEL: Final = 12
"""Columns of the labels."""


def line(label: str, text: str) -> str:
    """Return a line whose text begins where that of every other line does."""
    return f"{label:<{_LABEL}}{text}"


def export_lines(result: ExportResult) -> list[str]:
    """Return where an export is, what was checked, what it was compared with and what was put right."""
    size = f"{result.bytes / 1e9:.2f} GB" if result.bytes >= 1e7 else f"{result.bytes / 1e6:.2f} MB"
    checks = () if result.verification is None else result.verification.checks
    skipped = sum(check.skipped for check in checks)
    passed = f"{len(checks) - skipped} checks passed{f', {skipped} skipped' if skipped else ''}"
    proven = "NOT verified" if result.verification is None else passed
    lines = [line("export", f"{result.path} ({size} in {result.seconds:.1f} s; {proven})")]
    if result.base is None:
        lines.append(line("base", result.sources["base"]))
    files = sorted({repair.file for repair in result.repairs})
    if files:
        count = f"{len(result.repairs)} value{'' if len(result.repairs) == 1 else 's'}"
        lines.append(line("put right", f"{count} of the base, in {', '.join(files)}"))
    return lines


def latency_lines(rows: Sequence[LatencyRow]) -> list[str]:
    """Return a training's rows in a few lines of 80 columns: a table of exact lengths, and what was asked besides.

    Its ratios are of the time per token. Natural answers are a line where their verdict is another than a tie: the
    time of the export's whole answer beside the base's. The report has the whole.
    """
    fixed = {row.arm: row for row in rows if row.workload.kind == "fixed" and not is_swept(row)}
    natural = {row.arm: row for row in rows if row.workload.kind == "natural" and row.workload.thinking is not False}
    return _table_lines(fixed) + _natural_lines(natural) + at_once_lines(rows) + question_lines(rows)


def _table_lines(rows: Mapping[str, LatencyRow]) -> list[str]:
    if not rows:
        return []
    first = next(iter(rows.values()))
    lines = [f"{'latency, ms':<20}{'TTFT':>8}{'TPOT':>8}{'E2E':>9}  TPOT over {label_of(first.arm)}'s"]
    for row in rows.values():
        if row.error is not None:
            lines.append(f"  {label_of(row.arm):<18}  {row.error}")
            continue
        ratio = next((ratio for ratio in row.ratios if ratio.metric == "tpot_s"), None)
        values = (median_of(row.ttft_s, 1e3), median_of(row.tpot_s, 1e3), median_of(row.e2e_s, 1e3))
        cells = "".join(
            f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"
            for value, digits, width in zip(values, (1, 2, 0), (8, 8, 9), strict=True)
        )
        lines.append(f"  {label_of(row.arm):<18}{cells}  {'' if ratio is None else _told(ratio)}".rstrip())
    return lines


def _natural_lines(rows: Mapping[str, LatencyRow]) -> list[str]:
    """Return the export's natural answers (or the last arm's) beside the base's; nothing for a tie."""
    if not rows:
        return []
    row = rows.get("export") or list(rows.values())[-1]
    if row.error is not None:
        return [line("natural", f"{label_of(row.arm)}: {row.error}")]
    ratio = next((ratio for ratio in row.ratios if ratio.metric == "e2e_s"), None)
    if ratio is not None and ratio.verdict in ("cannot tell", "same"):
        return []
    took, told = median_of(row.e2e_s, 1e3), ""
    if ratio is not None:
        told = f"; over {label_of(ratio.against)}'s {_told(ratio)}"
    return [line("natural", f"a whole answer {'-' if took is None else f'{took:.0f}'} ms{told}")]


def question_lines(rows: Sequence[LatencyRow]) -> list[str]:
    """Return what thinking costs and what larger batches bring, one or two lines of 80 columns each."""
    lines = []
    thinking, batches = subject_of(thinking_in(rows)), batches_of_rows(rows)
    if thinking is not None:
        lines += _fitting("thinking", thinking_parts(thinking), most=1 if thinking.share is None else 2)
    if batches is not None:
        lines += _fitting("batches", batch_parts(batches), most=2)
    return lines


def _fitting(label: str, parts: Sequence[str], *, most: int) -> list[str]:
    """Return as many of the first parts as so many aligned lines of 80 columns hold; the first in any case."""
    shown: list[str] = []
    for count in range(1, len(parts) + 1):
        texts = textwrap.wrap("; ".join(parts[:count]), width=80 - _LABEL, break_long_words=False)
        if len(texts) > most and shown:
            break
        shown = texts
    return [line(label if index == 0 else "", text) for index, text in enumerate(shown)]


def _told(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"no interval ({ratio.pairs} rounds)"
    return f"{ratio.low:.2f} to {ratio.high:.2f}  {ratio.verdict}"


def verdict_lines(review: Review, findings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one verdict on the speed, and how many faults a plain save had and the export has."""
    lines = []
    headline = headline_of(review)
    if headline is not None:
        words = {"": headline.figure, "same": f"{headline.figure} the base's time per token, the same within 3%"}
        told = words.get(headline.verdict, f"{headline.figure} the base's time per token: {headline.verdict}")
        lines.append(line("speed", told))
    counts = {arm: fault_count(found) for arm, found in findings.items() if arm in ("checkpoint", "export")}
    if counts:
        names = {"checkpoint": "a plain save", "export": "the export"}
        lines.append(line("faults", ", ".join(f"{count} in {names[arm]}" for arm, count in counts.items())))
    return lines


def fault_count(diagnosis: Mapping[str, Any]) -> int:
    """Return the number of findings that are worse than a note."""
    return sum(finding.get("severity") != "note" for finding in diagnosis.get("findings") or ())
