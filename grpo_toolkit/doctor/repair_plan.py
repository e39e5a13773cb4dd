"""The plan of a repair, made from findings without touching the disk.

The plan is found by repairing and examining in turn: the first finding that can be repaired is, in memory, and the
folder as it would then be is examined again. So remedies cannot contradict each other, and a repaired folder needs no
repair.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import WEIGHTS_INDEX
from grpo_toolkit.checkpoint.json_files import ABSENT, parse_json
from grpo_toolkit.checkpoint.short_repr import ShortRepr
from grpo_toolkit.doctor import json_edit
from grpo_toolkit.doctor.compare_bytes import compare_heads
from grpo_toolkit.doctor.diagnose import DIALECT_CODES, diagnose_folder, parse_folder
from grpo_toolkit.doctor.findings import Edit, Finding, Remedy, Severity, Unmark, WholeFile
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.parsed_folder import JSON_LIMITS
from grpo_toolkit.doctor.planned_files import DiskFiles, Files, PlannedFiles
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from grpo_toolkit.doctor.parsed_folder import Folder

_MOST_STEPS = 400
_MAX_COPIED = 128 * 2**20
_MOST_SHOWN = 64 * 1024
_UNPRINTABLE = re.compile(r"[^\t\x20-\x7e\xa0-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file before and after the repair; None where there is none."""

    file: str
    before: bytes | None
    after: bytes | None

    def diff(self) -> Iterator[str]:
        """Yield the change as a unified diff, a line at a time."""
        names = (
            (f"a/{self.file}" if self.before is not None else "/dev/null"),
            (f"b/{self.file}" if self.after is not None else "/dev/null"),
        )
        whole = self.after if self.before is None else self.before if self.after is None else b""
        if whole is not None and len(whole) > _MOST_SHOWN:  # a vocabulary, say
            yield from (f"--- {names[0]}", f"+++ {names[1]}", f"@@ {len(whole):,} bytes @@")
            return
        before, after = (_lines(content) for content in (self.before, self.after))
        yield from difflib.unified_diff(before, after, *names, lineterm="", n=2)


def _lines(content: bytes | None) -> list[str]:
    text = "" if content is None else content.decode("utf-8", errors="replace")
    return [_UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], line) for line in text.splitlines()]


@dataclass(frozen=True, kw_only=True, repr=False)
class RepairPlan(ShortRepr):
    """The changes that `repair` will make.

    Attributes:
        path: the folder.
        base: the base that was compared with, or None.
        changes: the JSON and tokenizer files that change.
        weights: what becomes of tensors; empty where weights stay as they are.
        shards: the safetensors files that are rewritten for it.
        mended: the findings that go.
        left: the findings that stay, notes included.
    """

    path: Path
    base: Path | None
    changes: tuple[FileChange, ...]
    weights: TensorChanges
    shards: tuple[str, ...]
    mended: tuple[Finding, ...]
    left: tuple[Finding, ...]

    @property
    def is_empty(self) -> bool:
        return not self.changes and not self.shards

    @property
    def is_clean_afterwards(self) -> bool:
        return all(finding.severity is Severity.NOTE for finding in self.left)

    @cached_property
    def diff(self) -> str:
        """Every change of a file as a unified diff."""
        return "\n".join(line for change in self.changes for line in change.diff())

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "base": None if self.base is None else str(self.base),
            "files": [change.file for change in self.changes],
            "shards": list(self.shards),
            "diff": self.diff,
            "mended": [finding.to_json() for finding in self.mended],
            "findings": [finding.to_json() for finding in self.left],
            "clean": self.is_clean_afterwards,
        }


def make_plan(source: Files, *, base: Path | None = None, rewrite_weights: bool = False) -> RepairPlan:
    """Plan the repair of a folder.

    Raises:
        CheckpointError: nothing in the folder that could be examined.
    """
    folder = parse_folder(source, base=base)
    base = None if folder.base is None else folder.base.path
    bases = {} if folder.base is None else {folder.base.path: folder.base}
    digests = compare_heads(folder) if rewrite_weights else None
    return _mend(
        source,
        replace(folder, digests=digests),
        parse=lambda files: replace(parse_folder(files, base=base, bases=bases), digests=digests),
        may_mend=lambda found: rewrite_weights or not found.needs_rewriting,
    )


def plan_older_forms(source: Files) -> RepairPlan:
    """Plan the changes that let older versions read a folder, by the rules of `rules/dialect.py`.

    They apply whatever the folder's base has. Older versions also look for the tie of embeddings elsewhere.

    Raises:
        CheckpointError: nothing in the folder that could be examined.
    """
    codes = DIALECT_CODES | {"head-missing"}
    return _mend(source, read_folder(source), parse=read_folder, may_mend=lambda found: found.code in codes)


def _mend(
    source: Files, folder: Folder, *, parse: Callable[[Files], Folder], may_mend: Callable[[Finding], bool]
) -> RepairPlan:
    planned = PlannedFiles(under=source, changed={})
    base = None if folder.base is None else folder.base.path
    mended: list[Finding] = []
    tried: set[tuple[str, str, str]] = set()
    for _ in range(_MOST_STEPS):
        findings = diagnose_folder(folder).findings
        finding = next((found for found in findings if may_mend(found) and _is_due(found, tried)), None)
        if finding is None:
            break
        tried.add((finding.code, finding.file, finding.key))
        mended.append(finding)
        for remedy in finding.remedies:
            planned = _apply(remedy, planned, base)
        folder = parse(planned)
    left = diagnose_folder(folder).findings
    gone = {(finding.code, finding.file, finding.key) for finding in left}
    return RepairPlan(
        path=source.path,
        base=base,
        changes=tuple(_changes(planned)),
        weights=planned.weights,
        shards=tuple(_rewritten_shards(source, planned)),
        mended=tuple(finding for finding in mended if (finding.code, finding.file, finding.key) not in gone),
        left=left,
    )


def _is_due(finding: Finding, tried: set[tuple[str, str, str]]) -> bool:
    return (
        finding.repairable
        and finding.severity is not Severity.NOTE
        and (finding.code, finding.file, finding.key) not in tried
    )


def _apply(remedy: Remedy, planned: PlannedFiles, base: Path | None) -> PlannedFiles:
    if isinstance(remedy, TensorChanges):
        return _apply_weights(remedy, planned)
    return replace(planned, changed={**planned.changed, remedy.file: _new_content(remedy, planned, base)})


def _new_content(remedy: Edit | WholeFile | Unmark, planned: PlannedFiles, base: Path | None) -> bytes | None:
    if isinstance(remedy, WholeFile):
        if remedy.content is ABSENT:
            return None
        if remedy.content is None:
            assert base is not None, "a file is copied from the base only where there is one"
            return DiskFiles(base).read(remedy.file, limit=_MAX_COPIED)
        return f"{json_edit.dumps(remedy.content, indent=2)}\n".encode()
    raw = planned.read(remedy.file, limit=JSON_LIMITS.get(remedy.file, _MAX_COPIED))
    if isinstance(remedy, Unmark):
        return raw.removeprefix(b"\xef\xbb\xbf")
    mark = raw[:3] if raw.startswith(b"\xef\xbb\xbf") else b""
    text = raw.decode("utf-8-sig")
    if remedy.value is ABSENT:
        text = json_edit.delete_key(text, remedy.path)
    else:
        text = json_edit.set_value(text, remedy.path, remedy.value)
    return mark + text.encode()


def _apply_weights(remedy: TensorChanges, planned: PlannedFiles) -> PlannedFiles:
    weights = planned.weights.then(remedy)
    changed = dict(planned.changed)
    if WEIGHTS_INDEX in planned.entries:
        raw = planned.under.read(WEIGHTS_INDEX, limit=JSON_LIMITS[WEIGHTS_INDEX])
        changed[WEIGHTS_INDEX] = _index_text(parse_json(raw, WEIGHTS_INDEX), planned.under, weights)
    return replace(planned, weights=weights, changed=changed)


def _index_text(index: dict[str, Any], under: Files, weights: TensorChanges) -> bytes:
    names = {name: weights.renames.get(name, name) for name in index["weight_map"]}
    weight_map = {new: index["weight_map"][name] for name, new in names.items() if new is not None}
    shards = sorted(set(index["weight_map"].values()))
    total = sum(info.nbytes for shard in shards for info in weights.apply(under.tensors(shard)).values())
    metadata = index.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    new = {**index, "metadata": {**kept, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return f"{json_edit.dumps(new, indent=2)}\n".encode()


def _changes(planned: PlannedFiles) -> Iterator[FileChange]:
    under = planned.under
    for file, after in sorted(planned.changed.items()):
        before = under.read(file, limit=_MAX_COPIED) if file in under.entries else None
        if before != after:
            yield FileChange(file=file, before=before, after=after)


def _rewritten_shards(source: Files, planned: PlannedFiles) -> Iterator[str]:
    touched = planned.weights.names
    for name in sorted(parse_folder(source).shards) if touched else ():
        if touched & set(source.tensors(name)):
            yield name
