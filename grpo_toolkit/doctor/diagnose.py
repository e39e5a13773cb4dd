"""The diagnosis of a folder: JSON and headers are read, every rule is asked, nothing is printed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.base_lookup import find_base, named_base
from grpo_toolkit.checkpoint.json_files import parse_json
from grpo_toolkit.checkpoint.lineage import BASE_RECORD, base_in_record
from grpo_toolkit.checkpoint.model_folder import ADAPTER_CONFIG, CONFIG
from grpo_toolkit.checkpoint.trainer_checkpoints import checkpoints_in
from grpo_toolkit.doctor.findings import RULES, Diagnosis, Fault, Finding, Rule, RunDiagnosis
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.parsed_folder import Folder, describe
from grpo_toolkit.doctor.planned_files import DiskFiles, Files
from grpo_toolkit.doctor.rules import adapter, cache, dialect, dtypes, files, processing, tied, weights
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODULES: Final = (files, cache, weights, tied, dtypes, dialect, processing, adapter)

ALL_RULES: Final = tuple(
    rule for module in _MODULES for rule in RULES.values() if rule.check.__module__ == module.__name__
)
"""Every rule, in the order of the table in the README."""

DIALECT_CODES: Final = frozenset(rule.code for rule in ALL_RULES if rule.check.__module__ == dialect.__name__)
"""The rules about forms that one library version writes and another cannot read."""


def diagnose_checkpoint(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, deep: bool = False
) -> Diagnosis | RunDiagnosis:
    """Find what is wrong with a model folder, or with every checkpoint of a run, from JSON and safetensors headers.

    No code of the folder is run, no pickle opened, no network asked; without `deep` no weight is read either.

    Args:
        path: a full model, an adapter, a trainer checkpoint, FSDP or DeepSpeed shards; or a run's folder with many.
        base: folder or Hub name (in the local cache) of the model that this one was trained from. By default the one
            that the folder names, if it is here.
        deep: also compare the bytes of weights: copies of the head, the base's weights, an adapter's zeros.

    Returns:
        The kind of the folder and its findings, worst first; of a run, those of its checkpoints.

    Raises:
        CheckpointError: no folder, or nothing in it that could be examined; or `base` is not a model folder here.
    """
    folder = Path(path)
    if os.path.isdir(folder) and checkpoints_in(folder):  # noqa: PTH112 - says no to names that Path cannot ask about
        diagnoses, empty = diagnose_run(folder, base=base, deep=deep)
        if not diagnoses:
            raise CheckpointError(f"{folder}: none of its checkpoints holds anything to examine: {empty[0]}")
        return RunDiagnosis(path=folder, diagnoses=tuple(diagnoses), empty=tuple(empty))
    return diagnose_model(folder, base=base, deep=deep)


def diagnose_model(folder: Path, *, base: str | os.PathLike[str] | None = None, deep: bool = False) -> Diagnosis:
    """Diagnose one folder, whether or not a run's checkpoints lie in it (see `diagnose_checkpoint`).

    Raises:
        CheckpointError: as there.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - says no to names that Path cannot ask about
        raise CheckpointError(f"{folder}: not a folder")
    named = None if base is None else named_base(base)
    return diagnose_files(DiskFiles(folder), base=named, deep=deep)


def diagnose_run(
    path: Path, *, base: str | os.PathLike[str] | None = None, deep: bool = False
) -> tuple[list[Diagnosis], list[str]]:
    """Diagnose every checkpoint of a run folder (and the folder itself where it holds a model too).

    Returns:
        The diagnoses, oldest checkpoint first, and a line for each checkpoint that holds nothing to examine.
    """
    diagnoses, empty = [], []
    bases: dict[Path, Folder] = {}
    named = None if base is None else named_base(base)
    for folder in (*checkpoints_in(path), path):
        try:
            diagnoses.append(diagnose_files(DiskFiles(folder), base=named, deep=deep, bases=bases))
        except CheckpointError as error:
            if folder != path:
                empty.append(str(error))
    return diagnoses, empty


def diagnose_files(
    source: Files, *, base: Path | None = None, deep: bool = False, bases: dict[Path, Folder] | None = None
) -> Diagnosis:
    """Diagnose files from anywhere; `bases` remembers bases that were read before."""
    return diagnose_folder(parse_folder(source, base=base, deep=deep, bases=bases))


def parse_folder(
    source: Files, *, base: Path | None = None, deep: bool = False, bases: dict[Path, Folder] | None = None
) -> Folder:
    """Read a folder with its base, ready for the rules."""
    folder = read_folder(source)
    found = base if base is not None else _recorded(source) or _base_in_files(folder)
    if found is not None and not _is_same(found, folder.path):
        folder = replace(folder, base=_read_base(found, {} if bases is None else bases, must=base is not None))
    if deep:
        from grpo_toolkit.doctor.compare_bytes import compare_weights

        folder = replace(folder, digests=compare_weights(folder))
    return folder


def diagnose_folder(folder: Folder) -> Diagnosis:
    """Ask every rule about a parsed folder; a pure function."""
    findings = [_finding(rule, fault) for rule in ALL_RULES for fault in rule.check(folder)]
    return Diagnosis(
        path=folder.path,
        kind=folder.kind.value,
        facts=describe(folder),
        base=None if folder.base is None else folder.base.path,
        findings=tuple(sorted(findings, key=lambda finding: finding.severity.rank)),
        not_judged=tuple(rule.code for rule in ALL_RULES if rule.needs_base) if folder.base is None else (),
    )


def _finding(rule: Rule, fault: Fault) -> Finding:
    return Finding(
        code=rule.code,
        severity=rule.severity,
        title=rule.title,
        file=fault.file,
        key=fault.key,
        found=fault.found,
        expected=fault.expected,
        effect=rule.effect,
        evidence=rule.evidence,
        repairable=bool(fault.remedies),
        remedies=fault.remedies,
    )


def _recorded(files: Files) -> Path | None:
    """Return the base that the checkpoint's record names; a record that cannot be read is none."""
    entry = files.entries.get(BASE_RECORD)
    if entry is None or entry.is_folder:
        return None
    try:
        return base_in_record(dict(parse_json(files.read(BASE_RECORD, limit=2**20), BASE_RECORD)))
    except CheckpointError:
        return None


def _base_in_files(folder: Folder) -> Path | None:
    for name in _names_of_base(folder):
        found = find_base(name)
        if found is not None:
            return found
    return None


def _names_of_base(folder: Folder) -> Iterator[str]:
    for file, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (CONFIG, "_name_or_path")):
        value = folder.get(file, key)
        if isinstance(value, str):
            yield value
    match = re.search(r"^base_model:[ \t]*['\"]?([^'\"\n]{1,200})", folder.card, re.MULTILINE)
    if match:
        yield match.group(1).strip()


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _read_base(path: Path, bases: dict[Path, Folder], *, must: bool) -> Folder | None:
    if path not in bases:
        try:
            bases[path] = read_folder(DiskFiles(path))
        except CheckpointError:
            if must:
                raise
            return None
    return bases[path]
