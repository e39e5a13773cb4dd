"""A diagnosis and a repair as plain text: what a pipe gets, and the words that the terminal's tables use too."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Severity, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from grpo_toolkit.doctor.findings import Diagnosis, Finding
    from grpo_toolkit.doctor.repair import RepairResult


def place_of(finding: Finding) -> str:
    """Where it is: the file, and the key in it."""
    key = show(finding.key) if finding.key else ""
    return f"{show(finding.file)}: {key}" if key else str(show(finding.file))


def found_and_expected(finding: Finding) -> str:
    """What was found there and what should be, in one line."""
    expected = f"expected {show(finding.expected, limit=160)}"
    if finding.found is ABSENT:
        return expected if finding.key == "" else f"absent, {expected}"
    found = show(finding.found)
    return f"{found if isinstance(found, str) else json.dumps(found)}, {expected}"


def advice(diagnosis: Diagnosis) -> list[str]:
    """What to do next, a line each."""
    lines = []
    mendable = [f for f in diagnosis.findings if f.repairable and f.severity is not Severity.NOTE]
    base = f" --base {diagnosis.base}" if diagnosis.base is not None else ""
    if mendable:
        count = f"{len(mendable)} of these can be mended" if len(mendable) > 1 else "one of these can be mended"
        flag = " --rewrite-weights" if any(finding.needs_rewriting for finding in mendable) else ""
        lines.append(f"{count}: grpo-toolkit repair {diagnosis.path}{base}{flag}")
    if diagnosis.not_judged:
        lines.append(f"not judged without a base ({len(diagnosis.not_judged)} rules): pass --base FOLDER")
    return lines


def verdict(findings: Sequence[Finding]) -> str:
    """The findings counted by severity, or "clean"."""
    counts = Counter(finding.severity for finding in findings)
    words = [f"{counts[severity]} {severity.value}" for severity in Severity if counts[severity]]
    if all(finding.severity is Severity.NOTE for finding in findings):
        return "clean" if not words else f"clean ({', '.join(words)})"
    return ", ".join(words)


def diagnosis_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """One folder's diagnosis."""
    yield f"{diagnosis.path}: {verdict(diagnosis.findings)}"
    yield f"  {', '.join((diagnosis.kind, *diagnosis.facts))}"
    if diagnosis.base is not None:
        yield f"  compared with {diagnosis.base}"
    for finding in diagnosis.findings:
        yield f"{finding.severity.value}: {finding.title} [{finding.code}]"
        yield f"  {place_of(finding)}: {found_and_expected(finding)}"
        yield f"  {finding.effect} ({finding.evidence})"
    yield from advice(diagnosis)


def run_lines(diagnoses: Sequence[Diagnosis], empty: Sequence[str]) -> Iterator[str]:
    """A run's checkpoints, a line each."""
    for diagnosis in diagnoses:
        codes = ", ".join(dict.fromkeys(f.code for f in diagnosis.findings if f.severity is not Severity.NOTE))
        yield f"{diagnosis.path.name or diagnosis.path}\t{diagnosis.kind}\t{verdict(diagnosis.findings)}\t{codes}"
    yield from empty


def repair_lines(result: RepairResult) -> Iterator[str]:
    """What a repair did or would do."""
    plan = result.plan
    if plan.is_empty:
        yield f"{plan.path}: nothing to mend"
    else:
        files = len(plan.changes) + len(plan.shards)
        done = "mended" if result.applied else "would mend"
        yield f"{plan.path}: {done} {len(plan.mended)} findings in {files} files"
    for finding in plan.mended:
        yield f"  {finding.code}: {place_of(finding)}"
    if plan.shards:
        yield f"  weights {'rewritten' if result.applied else 'to rewrite'}: {', '.join(plan.shards)}"
    for finding in plan.left:
        if finding.severity is not Severity.NOTE:
            yield f"left: {finding.code}: {place_of(finding)}: {found_and_expected(finding)}{_how(finding)}"


def _how(finding: Finding) -> str:
    return " (--rewrite-weights mends it)" if finding.needs_rewriting else ""
