"""The manifest of a published folder, `grpo_toolkit.json`: its origin, its versions and its files."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST, open_checkpoint
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

MANIFEST_VERSION: Final = 1
_RECORDED_PACKAGES: Final = ("grpo-toolkit", "torch", "transformers", "trl", "peft", "safetensors")


def write_manifest(folder: Path, facts: Mapping[str, Any], *, sums: bool = True) -> None:
    """Write the manifest of a staged folder: versions, the caller's facts, and every file with its size.

    Args:
        folder: complete but for the manifest.
        facts: what is particular to this export or merge.
        sums: also each file's sha256, which reads everything once more.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size} | ({"sha256": sha256(path)} if sums else {})
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"manifest_version": MANIFEST_VERSION, "versions": _versions(), **facts, "files": files}
    (folder / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")


def compare_manifest(path: str | os.PathLike[str]) -> tuple[int, dict[str, str]]:
    """Compare a published folder's files with its manifest.

    Returns:
        How many files the manifest lists, and what is wrong with those that are not as it says, or that it lacks.

    Raises:
        InputError: no manifest, or one without sums (a merge, an export that was not verified).
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no {MANIFEST} in it, so it is not an export of this package")
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise InputError(f"{folder / MANIFEST}: lists no files; it is damaged")
    if not all("sha256" in entry for entry in listed.values()):
        raise InputError(f"{folder / MANIFEST}: has sizes, but no sums, since this was not verified; export it again")
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    differing = dict.fromkeys(sorted(found - listed.keys()), "not in the manifest")
    for name, entry in listed.items():
        if name not in found:  # which also keeps a name that leads out of the folder from being opened
            differing[name] = "missing"
        elif (folder / name).stat().st_size != entry.get("bytes"):
            differing[name] = f"{(folder / name).stat().st_size} bytes, expected {entry.get('bytes')}"
        elif sha256(folder / name) != entry["sha256"]:
            differing[name] = "other content (sha256)"
    return len(listed), differing


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def manifest_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of an export.

    Raises:
        CheckpointError: the folder is no model folder.
        InputError: it is one, but not an export of ours.
    """
    checkpoint = open_checkpoint(path)
    manifest = checkpoint.json(MANIFEST)
    if not isinstance(manifest, dict):
        raise InputError(f"{checkpoint.path}: no {MANIFEST} in it, so it is not an export of this package")
    return manifest
