"""The doctor's findings as a check of a verification, so that the two are of one mind."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.name_lists import summarised
from grpo_toolkit.doctor.compare_bytes import inspect_values
from grpo_toolkit.doctor.diagnose import diagnose_folder, parse_folder
from grpo_toolkit.doctor.findings import Severity, show
from grpo_toolkit.doctor.planned_files import DiskFiles
from grpo_toolkit.doctor.readers import Reader, installed_reader
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.export.checks import Check
from grpo_toolkit.model.unheld_tensors import without_the_bases

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.doctor.findings import Finding
    from grpo_toolkit.model.load import LoadReport

_SERIOUS: Final = (Severity.UNLOADABLE, Severity.WRONG, Severity.SLOW)
# Of a folder that is verified beside its base, other checks say the same with figures of their own.
_CHECKED_ELSEWHERE: Final = ("generation-cache-off", "config-cache-off", "config-cache-off-latent")


def serious_findings(
    folder: Path, *, base: Path | None = None, reader: Reader | None = None, with_values: bool = False
) -> list[Finding]:
    """Return what the doctor finds in a folder that keeps a reader (by default the installed one) from its answers.

    Args:
        folder: a model or an adapter.
        base: the base's folder, or None.
        reader: who is asked for.
        with_values: look for tensors without information too; reads all weights.
    """
    parsed = parse_folder(DiskFiles(folder), base=base)
    if with_values:
        parsed = replace(parsed, digests=inspect_values(parsed))
    asked = reader or installed_reader()
    findings = diagnose_folder(parsed, installed=asked).findings
    return [finding for finding in findings if finding.severity in _SERIOUS and finding.concerns(asked)]


def check_findings(folder: Path, base: Path | None, *, sees: bool = True) -> Check:
    """Check that the doctor finds nothing that keeps the installed reader from its answers.

    Args:
        folder: the export.
        base: its base's folder, or None.
        sees: see `verify_export`.
    """
    passed_over = _CHECKED_ELSEWHERE if sees else (*_CHECKED_ELSEWHERE, "template-without-pictures")
    findings = [
        finding for finding in serious_findings(folder, base=base, with_values=True) if finding.code not in passed_over
    ]
    detail = "; ".join(map(in_one_line, findings)) or f"nothing that concerns {installed_reader() or 'a reader'}"
    return Check(name="nothing found by the doctor", passed=not findings, detail=detail)


def refuse_unloadable(folder: Path, base: Path | None) -> None:
    """Raise for a folder that the installed reader cannot load, with the doctor's reason and what mends it.

    Raises:
        CheckpointError: a finding says so.
    """
    findings = serious_findings(folder, base=base)
    broken = [finding for finding in findings if finding.severity is Severity.UNLOADABLE]
    if broken:
        said = "; ".join(map(in_one_line, broken))
        how = f"; mend it: grpo-toolkit repair {folder}" if all(finding.repairable for finding in broken) else ""
        raise CheckpointError(f"{folder}: cannot be loaded: {said}{how}")


def in_one_line(finding: Finding) -> str:
    """Return a finding in one line."""
    place = ": ".join(filter(None, (str(show(finding.file)), str(show(finding.key)))))
    found = "absent" if finding.found is ABSENT else show(finding.found)
    return f"{finding.title} [{finding.code}]: {place}: {found}, expected {show(finding.expected, limit=300)}"


def loads_whole(report: LoadReport, base: Base | None = None) -> Check:
    """Check that loading found every tensor of the model, and none that is not of it or of the base."""
    judged = report if base is None else without_the_bases(report, base)
    parts = {"missing": judged.missing, "unexpected": judged.unexpected, "mismatched": judged.mismatched}
    said = ", ".join(f"{what} {_counted(names)}" for what, names in parts.items())
    if passed_over := len(report.unexpected) - len(judged.unexpected):
        said += f"; {passed_over} of the base that its class does not hold"
    return Check(
        name="loads whole",
        passed=judged.is_clean,
        detail=f"{report.parameters:,} parameters in {report.dtype}; {said}",
    )


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({summarised(names)})" if len(names) > 1 else next(iter(names), "none")
