"""The diagnosis of a folder: JSON and headers are read, every rule is asked, nothing is printed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import find_base, is_hub_name, named_base
from grpo_toolkit.checkpoint.folders.lineage import BASE_RECORD, base_in_record, base_of_run
from grpo_toolkit.checkpoint.folders.look_around import models_below
from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, CONFIG, MANIFEST, Kind
from grpo_toolkit.checkpoint.folders.trainer_checkpoints import checkpoints_in
from grpo_toolkit.checkpoint.json_files import parse_json
from grpo_toolkit.doctor.findings import RULES, Diagnosis, Edit, Fault, Finding, Rule, RunDiagnosis, Severity
from grpo_toolkit.doctor.installed_configs import installed_knows
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.parsed_folder import Folder, describe
from grpo_toolkit.doctor.planned_files import DiskFiles, Files
from grpo_toolkit.doctor.readers import Reader, installed_reader, parse_reader, without
from grpo_toolkit.doctor.rules import (
    adapter,
    adapter_settings,
    cache,
    custom_code,
    dialect,
    files,
    fit,
    generation,
    ids,
    rotary,
    servers,
    settings,
    types,
)
from grpo_toolkit.doctor.rules.inputs import pictures, processing, prompts, special_tokens, tokenizers
from grpo_toolkit.doctor.rules.tensors import dtypes, experts, quantised, shards, tied, weights
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODULES: Final = (
    files, types, shards, cache, generation, experts, weights, ids, fit, settings, rotary, tied, dtypes, quantised,
    dialect, custom_code, tokenizers, special_tokens, prompts, processing, pictures, servers, adapter,
    adapter_settings,
)  # fmt: skip

ALL_RULES: Final = tuple(
    rule for module in _MODULES for rule in RULES.values() if rule.check.__module__ == module.__name__
)
"""Every rule, in the order in which the findings of a folder are listed."""

DIALECT_CODES: Final = frozenset(
    rule.code
    for rule in ALL_RULES
    if rule.check.__module__ == dialect.__name__
    or rule.check in (experts.experts_renamed, settings.layer_types_renamed)
)
"""The rules about forms that one library version writes and another cannot read."""


def diagnose_checkpoint(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    deep: bool = False,
    reader: str | Reader | None = None,
) -> Diagnosis | RunDiagnosis:
    """Find what is wrong with a model folder, or with every checkpoint of a run, from JSON and safetensors headers.

    No code of the folder is run, no pickle opened, no network asked; without `deep` no weight is read either.

    Args:
        path: a full model, an adapter, a trainer checkpoint, shards of FSDP, DeepSpeed, verl, Megatron and others; or
            a run's folder with many.
        base: folder or Hub name (in the local cache) of the model that this one was trained from. By default the one
            that the folder names, if it is here.
        deep: also compare the bytes of weights: copies of the head, the base's weights, an adapter's zeros.
        reader: who is judged for ("transformers==4.49", "vllm", "sglang"); by default every supported reader.

    Returns:
        The kind of the folder and its findings: those that concern the reader (by default the transformers that is
        installed) first, worst first; of a run, those of its checkpoints.

    Raises:
        CheckpointError: no folder, or nothing in it that could be examined; or `base` is not a model folder here.
    """
    folder = Path(path)
    base = None if base is None else named_base(base, trained=folder)
    is_folder = os.path.isdir(folder)  # noqa: PTH112 - says no to names that Path cannot ask about
    parts = parts_of(folder) if is_folder else []
    if len(parts) == 1 and not checkpoints_in(folder):
        files = DiskFiles(parts[0])
        return diagnose_files(files, base=base, deep=deep, reader=reader, below=folder)
    if parts:
        diagnoses, empty = diagnose_run(folder, base=base, deep=deep, reader=reader)
        if not diagnoses:
            raise CheckpointError(f"{folder}: none of its checkpoints holds anything to examine: {empty[0]}")
        return RunDiagnosis(path=folder, diagnoses=tuple(diagnoses), empty=tuple(empty))
    return diagnose_model(folder, base=base, deep=deep, reader=reader)


def diagnose_model(
    folder: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    deep: bool = False,
    reader: str | Reader | None = None,
) -> Diagnosis:
    """Diagnose one folder, whether or not a run's checkpoints lie in it (see `diagnose_checkpoint`).

    Raises:
        CheckpointError: as there.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - says no to names that Path cannot ask about
        raise CheckpointError(f"{folder}: not a folder")
    named = None if base is None else named_base(base)
    return diagnose_files(DiskFiles(folder), base=named, deep=deep, reader=reader)


def diagnose_run(
    path: Path,
    *,
    base: str | os.PathLike[str] | None = None,
    deep: bool = False,
    reader: str | Reader | None = None,
) -> tuple[list[Diagnosis], list[str]]:
    """Diagnose every checkpoint of a run folder, adapters with names of their own, and the folder itself if it is one.

    Returns:
        The diagnoses, oldest checkpoint first, and a line for each checkpoint that holds nothing to examine.
    """
    diagnoses, empty = [], []
    bases: dict[Path, Folder] = {}
    named = None if base is None else named_base(base)
    for folder in (*parts_of(path), path):
        try:
            diagnoses.append(diagnose_files(DiskFiles(folder), base=named, deep=deep, bases=bases, reader=reader))
        except CheckpointError as error:
            if folder != path:
                empty.append(str(error))
    return diagnoses, empty


def parts_of(path: Path) -> list[Path]:
    """Return the folders of a run that are examined one by one: its checkpoints, or what is in them.

    An adapter that is not called "default" lies in a folder of its own, inside a checkpoint or a folder that is
    nothing itself.
    """
    checkpoints = checkpoints_in(path)
    if not checkpoints:
        return models_below(path)
    return [part for checkpoint in checkpoints for part in models_below(checkpoint) or [checkpoint]]


def diagnose_files(
    source: Files,
    *,
    base: Path | None = None,
    deep: bool = False,
    bases: dict[Path, Folder] | None = None,
    reader: str | Reader | None = None,
    below: Path | None = None,
) -> Diagnosis:
    """Diagnose files from anywhere; `bases` remembers bases that were read before, `below` is the folder named."""
    named = parse_reader(reader) if isinstance(reader, str) else reader
    folder = parse_folder(source, base=base, deep=deep, bases=bases)
    return diagnose_folder(replace(folder, below=below), reader=named, installed=installed_reader())


def parse_folder(
    source: Files, *, base: Path | None = None, deep: bool = False, bases: dict[Path, Folder] | None = None
) -> Folder:
    """Read a folder with its base, ready for the rules; a base that is the folder itself is none."""
    folder = read_folder(source)
    if folder.kind is Kind.MODEL and folder.model_type:
        folder = replace(folder, is_known=installed_knows(folder.model_type))
    record, manifest = (_object_in(source, file) for file in (BASE_RECORD, MANIFEST))
    # A manifest has the public name of the base: a name without a slash is no path from here.
    names = [*_names_of_base(folder), *filter(is_hub_name, _names_in(manifest))]
    found = base or base_in_record(record) or next(filter(None, map(find_base, names)), None)
    found = found or base_of_run(folder.path)
    folder = replace(folder, base_name=next(iter([*_names_in(record), *names, *_names_in(manifest)]), ""))
    if found is not None and not _is_same(found, folder.path):
        folder = replace(folder, base=_read_base(found, {} if bases is None else bases, must=base is not None))
    if deep:
        from grpo_toolkit.doctor.compare_bytes import compare_weights

        folder = replace(folder, digests=compare_weights(folder))
    return folder


def diagnose_folder(folder: Folder, *, reader: Reader | None = None, installed: Reader | None = None) -> Diagnosis:
    """Ask every rule about a parsed folder; a pure function.

    Args:
        folder: parsed.
        reader: who is judged for; None for every reader.
        installed: the reader whose findings come first.
    """
    first = reader or installed
    judged = [rule for rule in ALL_RULES if folder.base is not None or not rule.needs_base]
    findings = [_finding(folder, rule, fault) for rule in judged for fault in rule.check(folder)]
    return Diagnosis(
        path=folder.path,
        kind=folder.place.what if folder.kind is Kind.FOREIGN and folder.place else folder.kind.value,
        facts=describe(folder),
        base=None if folder.base is None else folder.base.path,
        findings=tuple(sorted(findings, key=lambda finding: _order(finding, first))),
        reader=reader,
        installed=installed,
        base_name=folder.base_name if folder.base is None else "",
        not_judged=tuple(rule.code for rule in ALL_RULES if rule.needs_base) if folder.base is None else (),
    )


def _order(finding: Finding, reader: Reader | None) -> tuple[bool, bool, int]:
    """Return the place of a finding: notes last, before them what other readers alone fail on."""
    return finding.severity is Severity.NOTE, not finding.concerns(reader), finding.severity.rank


def _finding(folder: Folder, rule: Rule, fault: Fault) -> Finding:
    fails = fault.fails or rule.fails
    if folder.kind is Kind.ADAPTER and _UNREAD_BY_VLLM.search(fault.file):
        fails = without(fails, "vllm")
    is_mendable = not any(isinstance(remedy, Edit) and remedy.file in folder.refused for remedy in fault.remedies)
    remedies = fault.remedies if is_mendable else ()
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
        repairable=bool(remedies),
        remedies=remedies,
        fails=fails,
    )


# Under an adapter vLLM asks the base for the tokenizer and the template, whatever lies beside the factors (nothing in
# vllm/lora of 0.31 opens one; asked with broken ones, it answers as before).
_UNREAD_BY_VLLM: Final = re.compile(r"token|template|processor")


def _object_in(files: Files, name: str) -> dict[str, Any]:
    """Return the object in a record of ours; one that is absent or cannot be read is empty."""
    entry = files.entries.get(name)
    if entry is None or entry.is_folder:
        return {}
    try:
        return dict(parse_json(files.read(name, limit=2**22), name))
    except CheckpointError:
        return {}


def _names_in(record: dict[str, Any]) -> list[str]:
    name = record.get("base")
    return [name] if isinstance(name, str) and name else []


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
