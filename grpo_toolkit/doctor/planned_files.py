"""The source of a folder's bytes: the disk, or the disk with planned changes laid over it."""

from __future__ import annotations

import itertools
import os
import stat
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, Protocol

from grpo_toolkit.checkpoint.json_files import leaves_folder, read_bytes
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo, read_safetensors_header
from grpo_toolkit.doctor.tensor_changes import TensorChanges
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_ENTRIES: Final = 20_000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name in a folder. `leaves`: a link to something outside; `is_regular`: a file that may be read."""

    size: int = 0
    is_folder: bool = False
    is_regular: bool = True
    leaves: bool = False


class Files(Protocol):
    """The files of one folder."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str, *, limit: int) -> bytes:
        """Return the bytes of the file `name`; CheckpointError where it cannot or must not be read."""

    def head(self, name: str, *, limit: int) -> bytes:
        """Return at most the first `limit` bytes."""

    def tensors(self, name: str) -> dict[str, TensorInfo]:
        """Return the tensors in the header of a safetensors file."""


@dataclass(frozen=True)
class DiskFiles:
    """A folder on disk."""

    path: Path

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        try:
            with os.scandir(self.path) as scan:
                found = list(itertools.islice(scan, MAX_ENTRIES + 1))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{self.path}: cannot be listed ({reason})") from error
        if len(found) > MAX_ENTRIES:
            raise CheckpointError(f"{self.path}: more than {MAX_ENTRIES:,} entries, which no model's folder has")
        return {entry.name: _entry(entry, self.path) for entry in found}

    def read(self, name: str, *, limit: int) -> bytes:
        return read_bytes(self.path / name, limit=limit, inside=True)

    def head(self, name: str, *, limit: int) -> bytes:
        from grpo_toolkit.checkpoint.json_files import open_regular

        with open_regular(self.path / name, inside=True) as file:
            return file.read(limit)

    def tensors(self, name: str) -> dict[str, TensorInfo]:
        return read_safetensors_header(self.path / name, inside=True)


def _entry(entry: os.DirEntry[str], folder: Path) -> Entry:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing, or not permitted
        return Entry(is_regular=False)
    return Entry(
        size=status.st_size,
        is_folder=stat.S_ISDIR(status.st_mode),
        is_regular=stat.S_ISREG(status.st_mode),
        leaves=entry.is_symlink() and leaves_folder(folder / entry.name),
    )


@dataclass(frozen=True, kw_only=True)
class PlannedFiles:
    """A folder as it will be when planned changes are made: `changed` files (None: removed), `weights` rewritten."""

    under: Files
    changed: Mapping[str, bytes | None]
    weights: TensorChanges = field(default_factory=TensorChanges)

    @property
    def path(self) -> Path:
        return self.under.path

    @property
    def entries(self) -> Mapping[str, Entry]:
        entries = dict(self.under.entries)
        for name, content in self.changed.items():
            if content is None:
                entries.pop(name, None)
            else:
                entries[name] = Entry(size=len(content))
        return entries

    def read(self, name: str, *, limit: int) -> bytes:
        content = self.changed.get(name)
        if name not in self.changed:
            return self.under.read(name, limit=limit)
        if content is None:
            raise CheckpointError(f"{self.path / name}: cannot be read (it is to be removed)")
        if len(content) > limit:
            raise CheckpointError(f"{self.path / name}: larger than {limit} bytes")
        return content

    def head(self, name: str, *, limit: int) -> bytes:
        content = self.changed.get(name)
        return self.under.head(name, limit=limit) if content is None else content[:limit]

    def tensors(self, name: str) -> dict[str, TensorInfo]:
        return self.weights.apply(self.under.tensors(name))
