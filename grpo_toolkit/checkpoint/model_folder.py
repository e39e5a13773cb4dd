"""A saved model folder as data: its JSON files, its safetensors headers, what kind of folder it is; atomic publish.

Standard library only. Folders come from strangers, so everything is read by the strict readers of `reading.py`, and
names may not leave the folder.
"""

from __future__ import annotations

import enum
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import (
    ABSENT,
    Absent,
    JsonObject,
    TensorInfo,
    read_json,
    read_safetensors_header,
)
from grpo_toolkit.checkpoint.publish import make_folder, replace_folder, sync_folder
from grpo_toolkit.errors import CheckpointError, InputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "ABSENT",
    "Absent",
    "Checkpoint",
    "JsonObject",
    "Kind",
    "TensorInfo",
    "base_of_adapter",
    "check_output",
    "dump_json",
    "find_base",
    "named_base",
    "open_checkpoint",
    "read_json",
    "read_safetensors_header",
    "staged",
]

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
MANIFEST: Final = "grpo_toolkit.json"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"


class Kind(enum.Enum):
    """What a folder holds."""

    MODEL = "model"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model or an adapter. Make one with `open_checkpoint`."""

    path: Path
    kind: Kind

    def json(self, name: str) -> JsonObject | Absent:
        """The JSON object in the file `name`, or `ABSENT` where there is no such file."""
        path = self.path / name
        return read_json(path) if path.is_file() else ABSENT

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, in name order; empty where there are none."""
        single = self.path / (ADAPTER_WEIGHTS if self.kind is Kind.ADAPTER else WEIGHTS)
        if single.is_file():
            return [single]
        index_path = self.path / WEIGHTS_INDEX
        if not index_path.is_file():
            return []
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index_path}: `weight_map` is not an object; the folder cannot be loaded")
        return [self._shard(name, index_path) for name in _distinct(weight_map.values())]

    def _shard(self, name: object, index_path: Path) -> Path:
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"{index_path}: shard name {name!r} is not a plain file name in this folder")
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(f"{index_path}: names the shard {name}, which is not in the folder")
        return path

    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by name, read from the headers alone."""
        found: dict[str, TensorInfo] = {}
        for file in self.weight_files():
            found.update(read_safetensors_header(file))
        return found


def _distinct(names: Iterable[object]) -> list[object]:
    return [*sorted({name for name in names if isinstance(name, str)}), *(n for n in names if not isinstance(n, str))]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Recognise a checkpoint folder.

    Raises:
        CheckpointError: the path is not a folder, or holds neither `config.json` nor `adapter_config.json`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected one with {CONFIG} or {ADAPTER_CONFIG}")
    if (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint(folder, Kind.ADAPTER)
    if (folder / CONFIG).is_file():
        return Checkpoint(folder, Kind.MODEL)
    nested = sorted(child.name for child in folder.glob("checkpoint-*") if child.is_dir())
    hint = f"; did you mean {folder / nested[-1]}?" if nested else ""
    raise CheckpointError(f"{folder}: no {CONFIG} and no {ADAPTER_CONFIG}, so this is no checkpoint{hint}")


def find_base(name_or_path: str | None, *, revision: str | None = None) -> Path | None:
    """The local folder behind a model's name: the path itself, or its snapshot in the Hub cache. Never downloads.

    The cache is read by its documented layout (`models--org--name/refs/main`, `snapshots/<commit>`), not through
    huggingface_hub, whose import would double the time to an answer:
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    if not name_or_path or "\0" in name_or_path:
        return None
    folder = Path(name_or_path)
    if os.path.isdir(folder):  # noqa: PTH112 - unlike Path.is_dir, says no to a name that is too long
        return folder if (folder / CONFIG).is_file() else None
    if not _HUB_NAME.fullmatch(name_or_path) or ".." in name_or_path or "--" in name_or_path:
        return None
    cached = _hub_cache() / f"models--{name_or_path.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (cached / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = wanted
    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = cached / "snapshots" / commit
    # os.path.isfile, unlike Path.is_file, says no where another user's cache may not be entered.
    return snapshot if os.path.isfile(snapshot / CONFIG) else None  # noqa: PTH113


def named_base(name: str | os.PathLike[str]) -> Path:
    """The folder of a base that the caller named.

    Raises:
        InputError: it is not here.
    """
    folder = find_base(os.fspath(name))
    if folder is None:
        raise InputError(f"base {os.fspath(name)}: neither a model folder nor in the local Hub cache")
    return folder


def base_of_adapter(adapter: Path) -> Path:
    """The folder of the base that an adapter's config names.

    Raises:
        CheckpointError: it is not here.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    folder = find_base(name if isinstance(name, str) else None, revision=config.get("revision"))
    if folder is None:
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path is {name!r}, which is not on this machine; pass "
            "base= (--base)"
        )
    return folder


_HUB_NAME: Final = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-zA-Z][\w.-]{0,95}", re.ASCII)


def _hub_cache() -> Path:
    """Where the Hub cache lies: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else caches / "huggingface") / "hub"


def dump_json(data: Mapping[str, Any]) -> str:
    """JSON text as the field's libraries write it: two spaces, no escaped letters, a final newline."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def check_output(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before anything is done.

    Raises:
        OutputExistsError: it exists, and is not an export of ours or `overwrite` is False.
        InputError: its parent cannot be written.
    """
    target = Path(os.path.realpath(output_dir))
    # os.path.exists, unlike Path.exists before Python 3.14, also answers where a parent may not be entered.
    existing = next(folder for folder in (target, *target.parents) if os.path.exists(folder))  # noqa: PTH110
    if os.path.ismount(target):
        raise OutputExistsError(f"{output_dir}: is a mount point, which cannot be replaced; name a folder in it")
    if not existing.is_dir():
        raise OutputExistsError(f"{output_dir}: {existing} is a file, so no folder can be made there; name another")
    writable = target.parent if existing == target else existing
    if not os.access(writable, os.W_OK | os.X_OK):
        raise InputError(f"{output_dir}: no permission to write in {writable}; choose another folder or mend its mode")
    if existing == target and any(target.iterdir()):
        if not (output_dir / MANIFEST).is_file():
            raise OutputExistsError(
                f"{output_dir}: exists and is not an export of ours (no {MANIFEST} in it); "
                "name another folder or move this one away"
            )
        if not overwrite:
            raise OutputExistsError(
                f"{output_dir}: an export is there already; pass overwrite=True (--overwrite) to replace it"
            )


@contextmanager
def staged(output_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder beside `output_dir`, then rename it into place; on an exception nothing of it is left.

    The staging folder's name starts with a dot and ends with the owner's pid, so it never matches the
    `checkpoint-*` glob that trainers rotate. Every file is flushed to disk before the rename.
    """
    import platform
    import shutil
    import tempfile

    check_output(output_dir, overwrite=overwrite)
    output_dir = Path(os.path.realpath(output_dir))  # "." and links have no parent of their own to stage in
    make_folder(output_dir.parent)
    # The host's name keeps two machines on one file system from taking each other's exporters for dead.
    prefix = f".{output_dir.name}.staging-{platform.node()}-"
    _sweep(output_dir.parent, prefix)
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=f"-{os.getpid()}", dir=output_dir.parent))
    try:
        yield staging
        _finish_files(staging)
        check_output(output_dir, overwrite=overwrite)
        replace_folder(staging, output_dir)
    except OSError as error:
        if error.errno is not None:  # a library's own OSError would lose what it says
            error.filename = error.filename or os.fspath(output_dir)  # a write that fails names no file
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove staging folders whose owner is dead, and put back what it moved away and never replaced."""
    import glob
    import shutil

    for leftover in parent.glob(f"{glob.escape(prefix.replace('.staging-', '.previous-'))}*"):
        pid, published = leftover.name.rpartition("-")[2], parent / prefix[1:].partition(".staging-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            if published.exists():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.rename(published)
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finish_files(folder: Path) -> None:
    """Give every file the mode of the umask (safetensors >= 0.8 writes 0600) and flush it to disk."""
    mode = _umask_mode()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_nlink == 1:  # a linked file's mode is its other name's, too
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
        elif path.is_dir():
            path.chmod(mode | 0o111 & ~_umask())
            sync_folder(path)
    folder.chmod(0o777 & ~_umask())
    sync_folder(folder)


def _umask() -> int:
    # os.umask can only be read by setting it. /proc gives it without the race, where there is one.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    current = os.umask(0o022)
    os.umask(current)
    return current


def _umask_mode() -> int:
    return 0o666 & ~_umask()
