"""The base that a checkpoint was trained from, recorded beside its weights, and two folders in the wrong order.

An adapter names its base in `adapter_config.json`. A full checkpoint names it nowhere: what is compared with "the
base" would then depend on whoever remembers it. So the save hook writes it down. Of a run without the hook there may
be other records in its folder: the recipe's settings, and the configs of its W&B runs. Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import find_base, public_name
from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, MANIFEST
from grpo_toolkit.checkpoint.json_files import dump_json, open_regular, read_json
from grpo_toolkit.errors import CheckpointError

BASE_RECORD: Final = "training_base.json"
RECIPE_RECORD: Final = "grpo_recipe.json"
"""The settings of a run of `recipes/grpo.py`, in its output folder."""

_WANDB_VALUE: Final = re.compile(
    r"^(?P<key>model_name_or_path|_name_or_path):[ ]*\n(?:[ ]+desc:[^\n]*\n)?[ ]+value:[ ]*(?P<name>[^\n]+)$",
    re.MULTILINE,
)
_MOST_RUNS: Final = 64
_MOST_BYTES: Final = 2**20
NOT_COMPARED: Final = "no base was named, and none is recorded here, so nothing was compared with one"


def record_base(folder: Path, name: str, *, revision: str | None = None) -> None:
    """Write the base's name (a folder or a Hub name) into a checkpoint's folder."""
    record = {"base": name} | ({} if revision is None else {"revision": revision})
    (folder / BASE_RECORD).write_text(dump_json(record), encoding="utf-8")


def base_in_record(record: dict[str, Any]) -> Path | None:
    """Return the folder of the base that a record names, None where it is not on this machine."""
    name, revision = record.get("base"), record.get("revision")
    return find_base(name if isinstance(name, str) else None, revision=revision if isinstance(revision, str) else None)


def recorded_base(folder: Path) -> Path | None:
    """Return the folder of the base that a checkpoint's record or its run's names, None without a record or a base."""
    record = _read(folder / BASE_RECORD)
    found = base_of_run(folder) if record is None else base_in_record(record)
    return None if found is None or _is_same(found, folder) else found


def base_of_run(folder: Path) -> Path | None:
    """Return the base that the records of a run name: of the folder's own, or of the one that it is a checkpoint in.

    What the recipe was told goes first. Of W&B's runs, in `wandb/` beside the checkpoints, all must name one base: a
    folder in which several models were trained says nothing about one of them.
    """
    for run in (folder, folder.parent):
        names = _name_in_recipe(run) or _names_in_wandb(run)
        if len(names) == 1:
            found = find_base(names.pop())
            return None if found is None or _is_same(found, folder) else found
    return None


def _name_in_recipe(run: Path) -> set[str]:
    model = (_read(run / RECIPE_RECORD) or {}).get("model")
    name = model.get("model_name_or_path") if isinstance(model, dict) else None
    return {name} if isinstance(name, str) else set()


def _names_in_wandb(run: Path) -> set[str]:
    """Return the bases in the configs that W&B leaves as text; those of offline runs are in its own binary file."""
    found = set()
    for file in sorted((run / "wandb").glob("run-*/files/config.yaml"))[:_MOST_RUNS]:
        try:
            with open_regular(file) as opened:
                text = opened.read(_MOST_BYTES).decode("utf-8", errors="replace")
        except CheckpointError:
            continue
        names = {match["key"]: match["name"].strip("'\"") for match in _WANDB_VALUE.finditer(text)}
        found |= {name for name in [names.get("model_name_or_path") or names.get("_name_or_path")] if name}
    return found


def order_notice(base: str | os.PathLike[str], trained: str | os.PathLike[str]) -> str | None:
    """Return a line that says what is wrong with two folders given as base and trained model, or None.

    One folder twice has no difference to find. Two folders are swapped where the first one says of itself that it was
    trained from the second.
    """
    first, second = Path(base), Path(trained)
    if not (first.is_dir() and second.is_dir()):
        return None
    if _is_same(first, second):
        return f"{first} is given twice: every difference below is this machine's noise"
    if _names_as_base(first, second) and not _names_as_base(second, first):
        return f"base and trained model look swapped: {first} was trained from {second}; every ratio below is inverted"
    return None


def _names_as_base(folder: Path, base: Path) -> bool:
    recorded = recorded_base(folder)
    if recorded is not None:
        return _is_same(recorded, base)
    adapter = _read(folder / ADAPTER_CONFIG)
    if adapter is not None:
        name = adapter.get("base_model_name_or_path")
        found = find_base(name if isinstance(name, str) else None)
        return found is not None and _is_same(found, base)
    manifest = _read(folder / MANIFEST)  # it has the name alone, as exports are uploaded
    return manifest is not None and manifest.get("base") == public_name(base)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(read_json(file)) if file.is_file() else None
    except CheckpointError:
        return None


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
