"""The folder of a base, found by the name that a caller or an adapter gives: on disk or in the Hub's cache.

Nothing is downloaded. Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, CONFIG
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.errors import CheckpointError


def find_base(name_or_path: str | None, *, revision: str | None = None) -> Path | None:
    """Return the local folder behind a model's name, or None: the path itself, or its snapshot in the Hub cache.

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


def public_name(folder: Path) -> str:
    """Return a base's name for the public: its Hub name where it lies in the Hub's cache, else the folder's own."""
    for part in folder.absolute().parts:
        if match := re.fullmatch(r"models--([\w.\-]+?)--([\w.\-]+)", part):
            return f"{match[1]}/{match[2]}"
    return folder.resolve().name


def is_hub_name(name: str) -> bool:
    """Return whether a public name is one of the Hub, "organisation/name": a folder's name has no slash."""
    return name.count("/") == 1 and _HUB_NAME.fullmatch(name) is not None


def named_base(name: str | os.PathLike[str], *, trained: Path | None = None) -> Path:
    """Return the folder of a base that the caller named.

    Args:
        name: a folder or a Hub name.
        trained: the folder of the model that was trained from it.

    Raises:
        CheckpointError: it is not here, or it is the trained model itself.
    """
    folder = find_base(os.fspath(name))
    if folder is not None and trained is not None and os.path.realpath(folder) == os.path.realpath(trained):
        raise CheckpointError(f"--base {folder}: is the folder itself; name the model that it was trained from")
    if folder is None:
        given = os.fspath(name)
        raise CheckpointError(f"--base {given}: neither a model folder nor in the local Hub cache{_download(given)}")
    return folder


def _download(name: object) -> str:
    """Return how to fetch a name that looks like one of the Hub, "" for others."""
    return f"; fetch it: hf download {name}" if isinstance(name, str) and is_hub_name(name) else ""


def base_of_adapter(adapter: Path) -> Path:
    """Return the folder of the base that an adapter's config names.

    Raises:
        CheckpointError: it is not here.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    folder = find_base(name if isinstance(name, str) else None, revision=config.get("revision"))
    if folder is None:
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path is {name!r}, which is not on this machine; pass "
            f"base= (--base){_download(name)}"
        )
    return folder


_HUB_NAME: Final = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-zA-Z][\w.-]{0,95}", re.ASCII)


def _hub_cache() -> Path:
    """Return the folder of the Hub cache.

    Source: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
    """
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else caches / "huggingface") / "hub"
