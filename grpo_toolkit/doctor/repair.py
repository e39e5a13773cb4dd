"""The repair of a folder: a plan carried out file by file, atomically, with the old files kept.

Each file is written beside its place, flushed and renamed, so that at every moment the folder holds the old or the new
file, whole. What was there lies under `.grpo_toolkit/undo` (as a hard link where the file system has them, so keeping
weights costs nothing until they are rewritten), with a manifest that is written first. That manifest is the journal,
too: a repair that was killed between two renames is finished by the next one, since a folder that is half mended may
not show what it still lacks. The folder's own times are put back, because trainers rotate checkpoints by them. A link
is replaced, never written through: the Hub cache's blobs stay as they are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_toolkit.checkpoint.folders.base_lookup import named_base
from grpo_toolkit.checkpoint.publish import sync_folder
from grpo_toolkit.checkpoint.short_repr import HtmlTable
from grpo_toolkit.checkpoint.weights.copy_weights import rewrite_shard
from grpo_toolkit.doctor.planned_files import DiskFiles
from grpo_toolkit.doctor.repair_plan import RepairPlan, make_plan
from grpo_toolkit.doctor.undo import (
    _MANIFEST,
    _STAGING,
    UNDO,
    _fingerprint,
    _finish,
    _keep,
    _put_back,
    _read_manifest,
    _refuse_changed,
    _remove,
    _times_kept,
    _unfinished,
    _write,
    _write_manifest,
)
from grpo_toolkit.errors import CheckpointError, InputError


@dataclass(frozen=True, kw_only=True, repr=False)
class RepairResult(HtmlTable):
    """The outcome of a repair: the plan, and whether it was carried out (not with `dry_run`, nor if empty)."""

    plan: RepairPlan
    applied: bool

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "applied": self.applied}

    def table_rows(self) -> list[dict[str, object]]:
        what = "mended" if self.applied else "would be mended"
        return [
            {"finding": finding.code, "file": finding.file, "key": finding.key, "repair": done}
            for findings, done in ((self.plan.mended, what), (self.plan.left, "left"))
            for finding in findings
        ]


def repair_checkpoint(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    rewrite_weights: bool = False,
) -> RepairResult:
    """Repair what the doctor found and can repair.

    Args:
        path: the folder.
        base: folder or Hub name (in the local cache) of the model it was trained from; many faults can only be
            repaired with its values.
        dry_run: plan only; `result.plan.diff` shows every change.
        rewrite_weights: also repair what needs new safetensors files (names, dtypes, a doubled head), shard by shard.

    Returns:
        The plan and whether it was carried out. Repairing a second time changes nothing.

    Raises:
        CheckpointError: nothing in the folder that could be examined, or `base` is not here.
        InputError: the folder cannot be written, or the disk has no room for rewritten weights.
        VerificationError: a rewritten weight would not fit into the base's dtype; nothing was changed.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # noqa: PTH112
        raise CheckpointError(f"{folder}: not a folder")
    named = None if base is None else named_base(base, trained=folder)
    try:
        finished = not dry_run and _finish(folder)
        plan = make_plan(DiskFiles(folder), base=named, rewrite_weights=rewrite_weights)
        if dry_run or plan.is_empty:
            return RepairResult(plan=plan, applied=finished)
        _check_writable(folder, plan)
        with _times_kept(folder):
            _carry_out(folder, plan)
    except OSError as error:
        if (folder / UNDO / _MANIFEST).is_file():
            what = "run it again to go on, or put back with --undo what was replaced already"
        else:
            what = "nothing was changed"
            shutil.rmtree(folder / UNDO.parts[0], ignore_errors=True)
        raise InputError(f"{folder}: cannot be mended ({error.strerror}); {what}") from error
    return RepairResult(plan=plan, applied=True)


def undo_repair(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Put back, byte for byte, the files that repairs of this folder replaced, and return their names.

    Raises:
        InputError: no repair to undo, or a file was changed since (it is named, and nothing is touched).
    """
    folder = Path(path)
    undo = folder / UNDO
    if undo.is_symlink() or undo.parent.is_symlink() or not (undo / _MANIFEST).is_file():
        if undo.parent.is_dir():  # all that an undo leaves that was killed at its end
            with _times_kept(folder):
                _remove(undo)
        raise InputError(f"{folder}: no repair to undo (no {UNDO / _MANIFEST} in it)")
    try:
        _finish(folder)
        kept = _read_manifest(undo)
        _refuse_changed(folder, kept)
        with _times_kept(folder):
            for name, entry in kept.items():
                _put_back(folder / name, undo / name, entry)
            _remove(undo)
    except OSError as error:
        raise InputError(f"{folder}: cannot be put back ({error.strerror}); run it again to go on") from error
    return tuple(sorted(kept))


def _check_writable(folder: Path, plan: RepairPlan) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: no permission to write there; nothing was changed")
    if (folder / UNDO.parts[0]).is_symlink() or (folder / UNDO).is_symlink():
        raise InputError(f"{folder / UNDO}: is a link; nothing was changed")
    needed = sum((folder / shard).stat().st_size for shard in plan.shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: rewriting the weights needs {needed / 1e9:.1f} GB beside the old ones, and only "
            f"{free / 1e9:.1f} GB are free; nothing was changed"
        )


def _carry_out(folder: Path, plan: RepairPlan) -> None:
    """Stage everything, then keep what is there, then rename: nothing is replaced before all is written."""
    undo = folder / UNDO
    status = folder.stat()
    times = [status.st_atime_ns, status.st_mtime_ns]
    with _times_kept(folder):  # put back at once, in case of being killed
        undo.parent.mkdir(exist_ok=True)
    undo.mkdir(exist_ok=True)
    kept = _read_manifest(undo) if (undo / _MANIFEST).is_file() else {}
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=undo))
    try:
        for change in plan.changes:
            if change.after is not None:
                _write(staging / change.file, change.after)
        for shard in plan.shards:
            written = rewrite_shard(
                folder / shard,
                staging / shard,
                renames=plan.weights.renames,
                dtypes=plan.weights.dtypes,
                transposed=plan.weights.transposed,
                inside=True,
            )
            if written == 0:
                (staging / shard).unlink()
        names = [*(change.file for change in plan.changes), *plan.shards]
        for name in names:
            if name not in kept:  # what an earlier repair kept is older than what is there now
                kept[name] = _keep(folder / name, undo / name)
            _like(folder / name, staging / name)
            kept[name]["after"] = _fingerprint(staging / name)
        sync_folder(staging)
        sync_folder(undo)
        _write_manifest(undo, kept, unfinished={"staging": staging.name, "files": names, "times": times})
    except BaseException:
        if (_unfinished(undo) or {}).get("staging") != staging.name:  # else the next repair goes on from here
            shutil.rmtree(staging, ignore_errors=True)
            if not (undo / _MANIFEST).is_file():
                _remove(undo)
        raise
    _finish(folder)


def _like(original: Path, new: Path) -> None:
    """Give a new file the mode of the one it replaces."""
    if new.exists() and original.exists() and not original.is_symlink():
        new.chmod(original.stat().st_mode & 0o777)
