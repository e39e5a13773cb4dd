"""The old files that a repair keeps under `.grpo_toolkit/undo`, their manifest, and the way back from both.

The manifest is also the journal of a repair that was killed between two renames: `_finish` completes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.publish import sync_folder
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


UNDO: Final = Path(".grpo_toolkit", "undo")

_MANIFEST: Final = "undo.json"
_STAGING: Final = ".staging-"
_HASHED: Final = 64 * 2**20


def _refuse_changed(folder: Path, kept: dict[str, dict[str, Any]]) -> None:
    for name, entry in kept.items():
        if _fingerprint(folder / name) not in (entry["after"], entry["before"]):
            raise InputError(f"{folder / name}: changed since the repair, so it is not put back; move it away first")


def _remove(undo: Path) -> None:
    """Remove the manifest and the folders when every file is put back."""
    if undo.is_symlink() or undo.parent.is_symlink():
        return
    if undo.is_dir():
        shutil.rmtree(undo)
    with contextlib.suppress(OSError):  # not there, or something else of ours is in it
        undo.parent.rmdir()


def _read_manifest(undo: Path) -> dict[str, dict[str, Any]]:
    manifest = read_json(undo / _MANIFEST).get("files")
    is_sound = isinstance(manifest, dict) and all(
        name == Path(name).name and isinstance(entry, dict) and {"before", "after", "link"} <= set(entry)
        for name, entry in manifest.items()
    )
    if not is_sound or not isinstance(manifest, dict):
        raise InputError(f"{undo / _MANIFEST}: damaged; nothing was put back")
    return manifest


def _put_back(path: Path, kept: Path, entry: dict[str, Any]) -> None:
    if entry["link"] is not None:
        kept.unlink(missing_ok=True)  # of an undo that was killed
        kept.symlink_to(entry["link"])
        kept.replace(path)
    elif entry["before"] is None:
        path.unlink(missing_ok=True)
    elif kept.exists():
        kept.replace(path)
    sync_folder(path.parent)


def _finish(folder: Path) -> bool:
    """Give the files that a repair has staged their names; remove the files of one that never came so far.

    Returns:
        True where there was anything to finish.
    """
    undo = folder / UNDO
    if not undo.is_dir() or undo.is_symlink() or undo.parent.is_symlink():
        return False
    unfinished = _unfinished(undo)
    if unfinished is not None:
        staging = undo / unfinished["staging"]
        kept = _read_manifest(undo)
        for name in unfinished["files"]:
            if kept[name]["after"] is None:
                (folder / name).unlink(missing_ok=True)
            elif (staging / name).exists():  # else it has its name already
                (staging / name).replace(folder / name)
        sync_folder(folder)
        os.utime(folder, ns=tuple(unfinished["times"]))
        _write_manifest(undo, kept)
    for leftover in undo.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return unfinished is not None


def _unfinished(undo: Path) -> dict[str, Any] | None:
    if not (undo / _MANIFEST).is_file():
        return None
    unfinished = read_json(undo / _MANIFEST).get("unfinished")
    if unfinished is None:
        return None
    kept = _read_manifest(undo)
    is_sound = (
        isinstance(unfinished, dict)
        and re.fullmatch(rf"{re.escape(_STAGING)}\w+", str(unfinished.get("staging"))) is not None
        and isinstance(unfinished.get("files"), list)
        and set(map(str, unfinished["files"])) <= kept.keys()
        and isinstance(unfinished.get("times"), list)
        and [type(time) for time in unfinished["times"]] == [int, int]
    )
    if not is_sound:
        raise InputError(f"{undo / _MANIFEST}: damaged; nothing was changed")
    return dict(unfinished)


def _keep(path: Path, kept: Path) -> dict[str, Any]:
    """Keep the file as it is for `--undo` and return its entry of the manifest."""
    if path.is_symlink():
        return {"before": _fingerprint(path), "link": os.readlink(path)}  # noqa: PTH115 - as text, not as a Path
    if not path.exists():
        return {"before": None, "link": None}
    try:
        kept.unlink(missing_ok=True)
        os.link(path, kept)
    except OSError:
        shutil.copy2(path, kept)
    return {"before": _fingerprint(path), "link": None}


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_manifest(undo: Path, kept: dict[str, dict[str, Any]], *, unfinished: dict[str, Any] | None = None) -> None:
    temporary = undo / f".{_MANIFEST}"
    temporary.unlink(missing_ok=True)
    _write(temporary, dump_json({"files": kept} | ({"unfinished": unfinished} if unfinished else {})).encode())
    temporary.replace(undo / _MANIFEST)
    sync_folder(undo)


def _fingerprint(path: Path) -> str | None:
    """Return what identifies a file's content: its digest, for weights size and time; None for no file."""
    if path.is_symlink():
        return f"link:{os.readlink(path)}"  # noqa: PTH115
    if not path.exists():
        return None
    status = path.stat()
    if status.st_size > _HASHED:
        return f"{status.st_size}:{status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _times_kept(folder: Path) -> Iterator[None]:
    """Keep the folder's times: trainers rotate checkpoints by them."""
    status = folder.stat()
    try:
        yield
    finally:
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))
