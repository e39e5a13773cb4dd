"""The reading of a folder's files into the `Folder` that rules see: nothing in the folder is trusted, or raises.

A file that cannot be read is kept with the reason in `Folder.refused`, for a rule to report.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.layouts import layout_of
from grpo_toolkit.checkpoint.folders.look_around import (
    Place,
    around,
    has_weights,
    kind_of,
    look_above,
    look_around,
    names_in,
)
from grpo_toolkit.checkpoint.folders.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    Kind,
)
from grpo_toolkit.checkpoint.json_files import JsonObject, parse_json
from grpo_toolkit.checkpoint.safetensors_header import MAX_TENSORS, TensorInfo
from grpo_toolkit.doctor.parse_tokenizer import read_tokenizer
from grpo_toolkit.doctor.parsed_folder import (
    JSON_LIMITS,
    MIB,
    TEMPLATE_JINJA,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Folder,
    plain_shards,
    unnamed_weights,
)
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from grpo_toolkit.doctor.planned_files import Files

_CONTAINERS: Final = 50_000
_TOKENIZER_HEAD: Final = 4 * MIB
_TOKENIZER_START: Final = 4 * 1024
_README_HEAD: Final = 16 * 1024
_MAX_SHARDS: Final = 2_000


def read_folder(files: Files, *, base: Folder | None = None) -> Folder:
    """Read the files of a folder that the rules need.

    Raises:
        CheckpointError: it is no model folder of any kind.
    """
    entries = files.entries
    place = _recognise(files)
    kind = place.kind
    refused: dict[str, str] = {}
    repeated: dict[str, tuple[str, ...]] = {}
    marked = set()
    objects = {}
    for name, limit in JSON_LIMITS.items():
        if name in entries and not entries[name].is_folder:
            try:
                raw = files.read(name, limit=limit)
                if name == WEIGHTS_INDEX and raw.count(b":") > 2 * MAX_TENSORS:
                    raise CheckpointError(f"{name}: names more than {MAX_TENSORS:,} tensors, which no model has")
                objects[name], again = (_parsed_once if len(raw) <= MIB else _parsed)(raw, name)
            except CheckpointError as error:
                refused[name] = _reason(error)
                continue
            if again:
                repeated[name] = again
            if raw.startswith(b"\xef\xbb\xbf"):
                marked.add(name)
    if kind is Kind.ADAPTER:  # its config is the base's: what another trainer leaves beside it is asked by nobody
        objects.pop(CONFIG, None)
    shards = _read_shards(files, kind, objects, refused)
    if kind is Kind.MODEL and not has_weights(entries):
        place = look_above(files.path) or place
    return Folder(
        path=files.path,
        kind=kind,
        place=place,
        entries=entries,
        objects=objects,
        jinja=_read_text(files, TEMPLATE_JINJA, refused),
        tokenizer=read_tokenizer(files, objects.get(TOKENIZER_CONFIG)),
        added_tokens=_read_added_tokens(files, objects.get(TOKENIZER_CONFIG)),
        truncation=_read_truncation(files),
        card=_read_card(files),
        shards=shards,
        refused=refused,
        repeated=repeated,
        marked=frozenset(marked),
        base=base,
    )


def _parsed(raw: bytes, name: str) -> tuple[JsonObject, tuple[str, ...]]:
    """Return the object in a file, and the keys that stand twice."""
    again: list[str] = []
    return parse_json(raw, name, repeated=again, containers=_CONTAINERS), tuple(again)


# The checkpoints of a run have the same files, and nobody changes the objects.
_parsed_once = lru_cache(maxsize=16)(_parsed)


def _reason(error: CheckpointError) -> str:
    """Return the error without its path, which the finding names already."""
    return str(error).partition(": ")[2] or str(error)


def _recognise(files: Files) -> Place:
    """Return what the folder is or, where it is nothing itself, the shards that lie in its folders.

    Raises:
        CheckpointError: it is no model folder of any kind, and holds no shards; the message says what lies around.
    """
    path, entries = files.path, files.entries
    layout = layout_of(path.name, entries, names_in(path.parent))
    kind = kind_of(entries, layout)
    if kind in (Kind.MODEL, Kind.ADAPTER):
        return Place(path=path, kind=kind)
    if kind is not None:
        return look_above(path) or Place(path=path, kind=kind, layout=layout)
    below = next(iter(look_around(path)), None)
    if below is not None and below.layout is not None:
        return below
    raise CheckpointError(
        f"{path}: no {CONFIG}, no {ADAPTER_CONFIG}, no shards of a known layout and no checkpoint-* in it, so there "
        f"is nothing to examine{around(path)}"
    )


def _read_text(files: Files, name: str, refused: dict[str, str]) -> str | None:
    if name not in files.entries or files.entries[name].is_folder:
        return None
    try:
        return files.read(name, limit=MIB).decode("utf-8")
    except UnicodeDecodeError as error:
        refused[name] = f"not UTF-8 text ({error.reason})"
    except CheckpointError as error:
        refused[name] = _reason(error)
    return None


def _read_card(files: Files) -> str:
    """Return the YAML part of the model card, where trainers name themselves and the base."""
    if not _may_read(files, "README.md"):
        return ""
    try:
        text = files.head("README.md", limit=_README_HEAD).decode("utf-8", errors="replace")
    except CheckpointError:
        return ""
    match = re.match(r"---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
    return match.group(1) if match else ""


def _may_read(files: Files, name: str) -> bool:
    entry = files.entries.get(name)
    return entry is not None and entry.is_regular and not entry.leaves


def _read_added_tokens(files: Files, tokenizer_config: JsonObject | None) -> dict[str, int] | None:
    """Return the ids of the tokens added to the vocabulary, or None where no file has them."""
    decoder = (tokenizer_config or {}).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {
            entry["content"]: int(number)
            for number, entry in decoder.items()
            if isinstance(entry, dict)
            and isinstance(entry.get("content"), str)
            and re.fullmatch(r"[0-9]{1,9}", number)
        }
    if not _may_read(files, TOKENIZER):
        return None
    try:
        text = files.head(TOKENIZER, limit=_TOKENIZER_HEAD).decode("utf-8", errors="ignore")
        match = re.search(r'"added_tokens"\s*:\s*', text[:65_536])
        added = json.JSONDecoder().raw_decode(text, match.end())[0] if match else None
    except (CheckpointError, ValueError, RecursionError):
        return None
    if not isinstance(added, list):
        return None
    return {
        entry["content"]: entry["id"]
        for entry in added
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }


def _read_truncation(files: Files) -> JsonObject | None:
    """Return the truncation that tokenizer.json says, which stands before its long lists."""
    if not _may_read(files, TOKENIZER):
        return None
    try:
        text = files.head(TOKENIZER, limit=_TOKENIZER_START).decode("utf-8", errors="ignore")
        match = re.search(r'"truncation"\s*:\s*(?=\{)', text)
        found = json.JSONDecoder().raw_decode(text, match.end())[0] if match else None
    except (CheckpointError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_shards(
    files: Files, kind: Kind, objects: Mapping[str, JsonObject], refused: dict[str, str]
) -> dict[str, dict[str, TensorInfo]]:
    shards = {}
    total = 0
    names = _weight_files(files, kind, objects)
    if len(names) > _MAX_SHARDS:
        refused[WEIGHTS_INDEX] = f"names {len(names):,} shards, which no model has"
        return {}
    for name in names:
        if name not in files.entries:
            continue  # the index names it; `shard-missing` says so
        try:
            shards[name] = files.tensors(name)
        except CheckpointError as error:
            refused[name] = _reason(error)
            continue
        total += len(shards[name])
        if total > MAX_TENSORS:
            refused[name] = f"more than {MAX_TENSORS:,} tensors in all, which no model has"
            return {}
    return shards


def _weight_files(files: Files, kind: Kind, objects: Mapping[str, JsonObject]) -> list[str]:
    single = ADAPTER_WEIGHTS if kind is Kind.ADAPTER else WEIGHTS
    if single in files.entries:
        return [single]
    if kind is Kind.ADAPTER:
        return []
    if WEIGHTS_INDEX in files.entries:
        weight_map = objects.get(WEIGHTS_INDEX, {}).get("weight_map")
        return plain_shards(weight_map) if isinstance(weight_map, dict) else []
    return unnamed_weights(files.entries) if kind is Kind.MODEL else []
