"""`grpo_toolkit.json`: what a published folder is, where it came from and what its files are."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint import MANIFEST, dump_json, open_checkpoint
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

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


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
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
    """The manifest of an export.

    Raises:
        CheckpointError: the folder is no model folder.
        InputError: it is one, but not an export of ours.
    """
    checkpoint = open_checkpoint(path)
    manifest = checkpoint.json(MANIFEST)
    if not isinstance(manifest, dict):
        raise InputError(f"{checkpoint.path}: no {MANIFEST} in it, so it is not an export of this package")
    return manifest
