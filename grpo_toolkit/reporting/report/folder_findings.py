"""The doctor's findings in the folders that were timed, kept beside the rows, and an export's manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST
from grpo_toolkit.checkpoint.manifest import manifest_of
from grpo_toolkit.doctor.diagnose import diagnose_model
from grpo_toolkit.errors import GrpoToolkitError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from grpo_toolkit.latency.rows.review import Review

FINDINGS_FILE: Final = "findings.json"


def diagnose_arms(folders: Mapping[str, str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
    """Diagnose each arm's folder, compared with the arm `base` where there is one; returns JSON.

    A folder that cannot be diagnosed (an adapter's temporary folder that is gone, an endpoint) is left out.
    """
    base = folders.get("base")
    found: dict[str, dict[str, Any]] = {}
    for arm, folder in folders.items():
        try:
            found[arm] = diagnose_model(Path(folder), base=None if arm == "base" else base).to_json()
        except (GrpoToolkitError, OSError):
            continue
    return found


def write_findings(folder: Path, diagnoses: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep diagnoses beside `latency.jsonl`: the plain checkpoint's folder is gone when its report is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINDINGS_FILE).write_text(json.dumps(diagnoses, indent=2) + "\n", encoding="utf-8")


def findings_of(review: Review) -> dict[str, dict[str, Any]]:
    """Return diagnoses by arm: those kept from the measuring, and fresh ones of folders that are still here."""
    kept: dict[str, dict[str, Any]] = {}
    file = review.path / FINDINGS_FILE
    if file.is_file():
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # cut off by a crash: what is still here can be asked again
            read = {}
        kept = {arm: found for arm, found in read.items() if isinstance(found, dict)}
    known = {row.path for row in review.arms if row.arm in kept}
    folders = {
        row.arm: row.path
        for row in review.arms
        if row.arm not in kept and row.path not in known and Path(row.path).is_dir()
    }
    first = {path: arm for arm, path in reversed(folders.items())}
    return kept | diagnose_arms({arm: path for path, arm in first.items()})


def export_manifest(review: Review) -> dict[str, Any] | None:
    """Return the manifest of the newest comparison's export, None where it is gone or was never one of ours."""
    for row in review.arms:
        if row.arm == "export" and (Path(row.path) / MANIFEST).is_file():
            try:
                return manifest_of(row.path)
            except GrpoToolkitError:
                return None
    return None
