"""The result of an export, and its report in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import public_name
from grpo_toolkit.checkpoint.folders.lineage import NOT_COMPARED
from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST
from grpo_toolkit.checkpoint.manifest import write_manifest
from grpo_toolkit.checkpoint.publish import keep_rejected
from grpo_toolkit.checkpoint.short_repr import HtmlTable
from grpo_toolkit.errors import VerificationError, WorkerError
from grpo_toolkit.export.verify import VerificationResult

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from grpo_toolkit.checkpoint.base_files import Change
    from grpo_toolkit.checkpoint.generation_defaults import Repair


NONE: Final = f"NONE: {NOT_COMPARED}; pass base= (--base FOLDER)"


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportResult(HtmlTable):
    """A published export.

    Attributes:
        path: the folder.
        base: the folder of the base model whose files were carried; None where nothing was compared with one.
        repairs: values that were wrong in the base and are right in the export.
        changes: values that training changed and the export therefore carries.
        made_portable: what was changed in files that transformers 5 wrote, so that 4.x and servers can read them too.
        sources: what went in, by name: the source, and the base or adapter that it names.
        bytes: of all the files.
        verification: every check with its figure, or None where verification was switched off.
        seconds: how long it all took.
    """

    path: Path
    base: Path | None
    repairs: tuple[Repair, ...]
    changes: tuple[Change, ...]
    made_portable: tuple[str, ...]
    sources: Mapping[str, str]
    bytes: int
    verification: VerificationResult | None
    seconds: float

    def table_rows(self) -> list[dict[str, object]]:
        facts = [*self.sources.items(), *(("put right", str(repair)) for repair in self.repairs)]
        for check in () if self.verification is None else self.verification.table_rows():
            facts.append((str(check["check"]), f"{check['verdict']}: {check['detail']}"))
        return [{"what": name, "": value} for name, value in facts]


def write_report(
    staging: Path,
    result: ExportResult,
    verification: VerificationResult | WorkerError | None,
    notes: Mapping[str, Any],
) -> None:
    """Write the manifest of a staged export."""
    write_manifest(
        staging,
        {
            "base": None if result.base is None else public_name(result.base),  # no path: exports are uploaded
            "put_right": [asdict(repair) for repair in result.repairs],
            "changed_in_training": [str(change) for change in result.changes],
            "made_portable": list(result.made_portable),
            "verification": report_of(verification),
            **notes,
        },
        sums=verification is not None,
    )


def report_of(verification: VerificationResult | WorkerError | None) -> dict[str, Any] | None:
    """Return a verification as the manifest has it: every check, or why the folder cannot be loaded."""
    if isinstance(verification, WorkerError):
        return {"passed": False, "checks": [], "error": str(verification)}
    return None if verification is None else verification.to_json()


def refuse_failed(
    staging: Path,
    target: Path,
    verification: VerificationResult | WorkerError | None,
    *,
    accepted: Collection[str] = (),
    way_out: str = "",
) -> None:
    """Raise for a folder that failed verification, and keep it under another name, with the report in it.

    Args:
        staging: the folder, complete.
        target: the name that it does not get.
        verification: its report.
        accepted: names of checks that it may fail.
        way_out: what can be done about it, beside mending it.

    Raises:
        VerificationError, WorkerError: see `export_model`.
    """
    failures = []
    if isinstance(verification, VerificationResult):
        failures = [check for check in verification.failures if check.name not in accepted]
    if not failures and not isinstance(verification, WorkerError):
        return
    kept = keep_rejected(staging, target)
    where = f"; what was refused is in {kept}, with the report in {MANIFEST}" if kept else ""
    if isinstance(verification, WorkerError):
        raise WorkerError(f"{verification}{where}") from verification
    failed = "; ".join(f"{check.name}: {check.detail}" for check in failures)
    raise VerificationError(f"not published, because the export failed verification: {failed}{way_out}{where}")
