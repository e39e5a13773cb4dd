"""Diagnoses and repairs as lines: plain text for a pipe, colours and columns for a terminal.

The standard library alone, and no `rich`: the doctor's answer is to be there before that would be imported.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.lineage import NOT_COMPARED
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Severity, show
from grpo_toolkit.doctor.readers import in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from grpo_toolkit.doctor.findings import Diagnosis, Finding, Rule
    from grpo_toolkit.doctor.repair import RepairResult
    from grpo_toolkit.doctor.repair_plan import RepairPlan

_CODES: Final = {
    "unloadable": "1;31",
    "wrong": "1;35",
    "slow": "1;33",
    "wasteful": "1;34",
    "note": "2",
    "bad": "1;31",
    "clean": "1;32",
    "bold": "1",
    "dim": "2",
    "place": "36",
    "left": "33",
    "+": "32",
    "-": "31",
    "@": "36",
}
"""Styles and their ANSI codes; a severity's name is a style."""


class Plain:
    """A paper for a pipe or a file: no styles, a paragraph a line, tabs between cells."""

    def text(self, text: str, style: str = "") -> str:
        """Return a text in a style."""
        return text

    def paragraph(self, text: str, source: str) -> str:
        """Return an indented paragraph that ends with its source."""
        return f"  {text} ({source})"

    def rows(self, rows: Sequence[Sequence[str]], styles: Sequence[str]) -> Iterator[str]:
        """Yield rows of cells; `styles` are those of the rows' third cells, the verdicts."""
        yield from map("\t".join, rows)


class Coloured(Plain):
    """A paper for a terminal; what a stranger's file says is printable by now (`findings.show`)."""

    def text(self, text: str, style: str = "") -> str:
        """Return a text in a style."""
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style in _CODES else text

    def paragraph(self, text: str, source: str) -> str:
        """Return an indented paragraph, its lines as wide as the terminal, its source below, and an empty line."""
        import shutil
        import textwrap

        width = shutil.get_terminal_size().columns
        lines = textwrap.wrap(text, max(20, width - 2), break_long_words=False, break_on_hyphens=False)
        return "\n".join([*(f"  {line}" for line in lines), f"  {self.text(source, 'dim')}", ""])

    def rows(self, rows: Sequence[Sequence[str]], styles: Sequence[str]) -> Iterator[str]:
        """Yield a heading and the rows, in columns."""
        table = [("checkpoint", "kind", "verdict", "findings"), *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for cells, style in zip(table, ("", *styles), strict=True):
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            looks = ("", "", style, "") if style else ("dim",) * len(padded)
            yield "  ".join(map(self.text, padded, looks)).rstrip()


def paper() -> Plain:
    """Return what suits standard output: colours on a terminal that has and wants them, plain text elsewhere."""
    has_colours = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return Coloured() if has_colours else Plain()


def diagnosis_lines(diagnosis: Diagnosis, on: Plain | None = None) -> Iterator[str]:
    """Yield the diagnosis of one folder: what it is, its findings with their effects, what to do next."""
    on = on or Plain()
    style = "clean" if diagnosis.is_clean else "bad"
    judged = f" for {diagnosis.reader}" if diagnosis.reader is not None else ""
    yield f"{on.text(str(diagnosis.path), 'bold')}: {on.text(_verdict(diagnosis.judged) + judged, style)}"
    yield on.text(f"  {', '.join((diagnosis.kind, *diagnosis.facts))}", "dim")
    if diagnosis.base is not None:
        yield on.text(f"  compared with {diagnosis.base}", "dim")
    elif diagnosis.not_judged:
        yield on.text(f"NOT COMPARED: {_not_compared(diagnosis)}", "left")
    for finding in diagnosis.findings:
        severity = finding.severity.value
        yield f"{on.text(severity, severity)}: {on.text(finding.title, 'bold')} {on.text(f'[{finding.code}]', 'dim')}"
        yield f"  {on.text(_place(finding), 'place')}: {on.text(_found_and_expected(finding))}"
        if finding.severity is not Severity.NOTE:
            yield on.text(f"  for {in_words(finding.fails, diagnosis.reader or diagnosis.installed)}", "dim")
        yield on.paragraph(finding.effect, finding.evidence)
    for line in _advice(diagnosis):
        yield on.text(line, "clean")


def rule_lines(rule: Rule, on: Plain | None = None) -> Iterator[str]:
    """Yield what a kind of finding means, who is affected, and what repairs it."""
    on = on or Plain()
    severity = rule.severity.value
    yield f"{on.text(severity, severity)}: {on.text(rule.title, 'bold')} {on.text(f'[{rule.code}]', 'dim')}"
    yield on.text(f"  for {in_words(rule.fails)}" + (", beside its base" if rule.needs_base else ""), "dim")
    yield on.paragraph(rule.effect, rule.evidence)
    yield on.text(f"repair: {rule.mend}" if rule.mend else "repair: none that the doctor makes", "clean")


def run_lines(diagnoses: Sequence[Diagnosis], empty: Sequence[str], on: Plain | None = None) -> Iterator[str]:
    """Yield the checkpoints of a run, a line each."""
    on = on or Plain()
    rows, styles = [], []
    for diagnosis in diagnoses:
        codes = dict.fromkeys(f.code for f in diagnosis.judged if f.severity is not Severity.NOTE)
        name = str(diagnosis.path.name or diagnosis.path)
        rows.append((name, str(diagnosis.kind), _verdict(diagnosis.judged), ", ".join(codes)))
        worst = min((f.severity for f in diagnosis.judged), key=lambda severity: severity.rank, default=Severity.NOTE)
        styles.append("clean" if diagnosis.is_clean else worst.value)
    yield from on.rows(rows, styles)
    for line in empty:
        yield on.text(line, "dim")
    alone = [diagnosis for diagnosis in diagnoses if diagnosis.not_judged]
    if alone:
        yield on.text(f"NOT COMPARED ({len(alone)} of {len(diagnoses)}): {_not_compared(alone[0])}", "left")


def repair_lines(result: RepairResult, on: Plain | None = None) -> Iterator[str]:
    """Yield what a repair did; of one that was not applied, the changes first, as a diff."""
    on = on or Plain()
    plan = result.plan
    for line in () if result.applied or plan.is_empty else plan.diff.splitlines():
        yield on.text(line, line[:1] if line[:1] in _CODES else "dim")
    files = len(plan.changes) + len(plan.shards)
    done = f"{'mended' if result.applied else 'would mend'} {len(plan.mended)} findings in {files} files"
    left = [finding for finding in plan.left if finding.severity is not Severity.NOTE]
    mendable = [finding for finding in left if finding.needs_rewriting]
    nothing = f"nothing to mend{' without --rewrite-weights' if mendable else ''}"
    yield on.text(f"{plan.path}: {nothing if plan.is_empty else done}", "bold")
    for finding in plan.mended:
        yield on.text(f"  {finding.code}: {_place(finding)}")
    if plan.shards:
        yield on.text(f"  weights {'rewritten' if result.applied else 'to rewrite'}: {', '.join(plan.shards)}")
    for finding in left:
        how = " (--rewrite-weights mends it)" if finding.needs_rewriting else ""
        yield on.text(f"left: {finding.code}: {_place(finding)}: {_found_and_expected(finding)}{how}", "left")
    if left:
        yield f"exit code 1, because of what is left{f'; {_offer(mendable, plan)}' if mendable else ''}"


def _place(finding: Finding) -> str:
    key = show(finding.key) if finding.key else ""
    return f"{show(finding.file)}: {key}" if key else str(show(finding.file))


def _found_and_expected(finding: Finding) -> str:
    expected = f"expected {show(finding.expected, limit=600)}"
    if finding.found is ABSENT:
        return expected if finding.key == "" else f"absent, {expected}"
    found = show(finding.found)
    return f"{found if isinstance(found, str) else json.dumps(found)}, {expected}"


def _not_compared(diagnosis: Diagnosis) -> str:
    if diagnosis.base_name:
        name = show(diagnosis.base_name)
        said = f"the base that is named here, {name}, is not on this machine, so nothing was compared with one"
        return f"{said} ({len(diagnosis.not_judged)} rules); pass --base FOLDER"
    return f"{NOT_COMPARED} ({len(diagnosis.not_judged)} rules); pass --base FOLDER"


def _advice(diagnosis: Diagnosis) -> Iterator[str]:
    mendable = [f for f in diagnosis.judged if f.repairable and f.severity is not Severity.NOTE]
    if mendable:
        yield _offer(mendable, diagnosis)
        yield f"  and put back as it was: grpo-toolkit repair {shlex.quote(str(diagnosis.path))} --undo"


def _offer(mendable: Sequence[Finding], found: Diagnosis | RepairPlan) -> str:
    count = f"{len(mendable)} of these can be mended" if len(mendable) > 1 else "one of these can be mended"
    base = f" --base {shlex.quote(str(found.base))}" if found.base is not None else ""
    flag = " --rewrite-weights" if any(finding.needs_rewriting for finding in mendable) else ""
    return f"{count}: grpo-toolkit repair {shlex.quote(str(found.path))}{base}{flag}"


def _verdict(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.severity for finding in findings)
    words = [f"{counts[severity]} {severity.value}" for severity in Severity if counts[severity]]
    if all(finding.severity is Severity.NOTE for finding in findings):
        return "clean" if not words else f"clean ({', '.join(words)})"
    return ", ".join(words)
