"""The base's own files, with only what training changed merged in.

A library rewrites a folder in its own dialect when it saves: transformers 5 turns a published flat Qwen2.5-VL config
into a nested one that 4.49 and 4.57 cannot load, renames `rope_scaling`, drops `preprocessor_config.json`. So an
export carries the base's files byte for byte. What training really changed is found by comparing like with like: the
base and the trained model, both as this library describes them. Pure functions and plain files, standard library
only.
"""

from __future__ import annotations

import copy
import fnmatch
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults, capture_defaults, with_cache_defaults
from grpo_toolkit.checkpoint.json_files import ABSENT, JsonObject, dump_json, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# What a library writes of itself, and what trainers overwrite for their rollouts: no change of the model.
_NOISE: Final = frozenset(
    {
        "use_cache",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "architectures",
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "quantization_config",
    }
)
_DTYPE_KEYS: Final = frozenset({"dtype", "torch_dtype"})
# Trainer and TRL align these with the tokenizer. They are a change of the model only if its vocabulary changed.
_TOKEN_IDS: Final = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})

# What belongs to a tokenizer, a processor or the license. A list of what is carried rather than of what is not: a base
# folder may hold anything (pickles, logs, DeepSpeed's scripts), and an export must not pass it on.
_CARRIED: Final = (
    "tokenizer*.json", "*tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "*.model", "*.tiktoken", "*.jinja", "chat_template.json", "*processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_CARRIED_FOLDERS: Final = ("additional_chat_templates",)


# How a tokenizer was loaded and how rollouts pad, which transformers writes into tokenizer_config.json.
_TOKENIZER_NOISE: Final = frozenset({"padding_side", "truncation_side", "is_local", "local_files_only"})


@dataclass(frozen=True, kw_only=True)
class Change:
    """A value that training changed: the file, the dotted key, before and after; without a key the whole file."""

    file: str
    key: str = ""
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        if not self.key:
            return f"{self.file}: as the training's processor writes it, whose settings are not the base's"
        return f"{self.file}: {self.key} changed in training from {self.before!r} to {self.after!r}"


def config_changes(base: JsonObject, trained: JsonObject) -> tuple[Change, ...]:
    """Return the values that differ between two configs, both described by the same library version."""
    before, after = dict(_leaves(base)), dict(_leaves(trained))
    keys = [key for key in {**before, **after} if before.get(key, ABSENT) != after.get(key, ABSENT)]
    resized = any(key[-1] == "vocab_size" for key in keys)
    ignored = _NOISE if resized else _NOISE | _TOKEN_IDS
    return tuple(
        Change(file=CONFIG, key=".".join(key), before=before.get(key, ABSENT), after=after.get(key, ABSENT))
        for key in keys
        if not ignored & set(key)
    )


def merge_changes(published: JsonObject, changes: tuple[Change, ...]) -> JsonObject:
    """Apply changes to the base's own JSON, nested or flat: a flat file keeps the text model's keys at the top."""
    merged = copy.deepcopy(published)
    for change in changes:
        *parents, last = change.key.split(".")
        if parents and parents[0] == "text_config" and "text_config" not in merged:
            parents = parents[1:]
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
        if change.after is ABSENT:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(change.after)
    return merged


def _leaves(node: Mapping[str, Any], here: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*here, str(key)))
        else:
            yield (*here, str(key)), value


def write_configs(
    base: Path, output_dir: Path, *, changes: tuple[Change, ...] = (), overrides: Mapping[str, Any] | None = None
) -> InferenceDefaults:
    """Write the base's config and generation config into `output_dir`: its bytes, unless something has to change.

    Returns:
        The defaults as the files now carry them, with what was put right because the base was poisoned.
    """
    config = read_json(base / CONFIG)
    generation = read_json(base / GENERATION_CONFIG) if (base / GENERATION_CONFIG).is_file() else ABSENT
    defaults = capture_defaults(config, generation, folder=base, overrides=overrides)
    wanted = with_cache_defaults(merge_changes(config, changes), defaults)
    _write_json(base / CONFIG, output_dir / CONFIG, config, wanted)
    if generation is not ABSENT and defaults.generation is not ABSENT:
        _write_json(base / GENERATION_CONFIG, output_dir / GENERATION_CONFIG, generation, defaults.generation)
    return defaults


def declare_dtype(folder: Path, dtype: str) -> None:
    """Write `dtype` into the config of a folder of our own, at every level that has a dtype."""
    config = read_json(folder / CONFIG)
    written = _with_dtype(config, dtype)
    if not _DTYPE_KEYS & written.keys():
        written["torch_dtype"] = dtype  # the name that every version reads
    (folder / CONFIG).write_text(dump_json(written), encoding="utf-8")


def declare_version(folder: Path, version: str) -> None:
    """Write the version of transformers that saved a folder of our own into its config, over the base's."""
    config = read_json(folder / CONFIG)
    (folder / CONFIG).write_text(dump_json(config | {"transformers_version": version}), encoding="utf-8")


def _with_dtype(node: JsonObject, dtype: str) -> JsonObject:
    return {
        key: dtype if key in _DTYPE_KEYS else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in node.items()
    }


def _write_json(source: Path, target: Path, found: JsonObject, wanted: JsonObject) -> None:
    if found == wanted:
        shutil.copyfile(source, target)
    else:
        target.write_text(dump_json(wanted), encoding="utf-8")


def is_carried(name: str) -> bool:
    """Return whether a file of that name belongs to a tokenizer, a processor, a template or the license."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _CARRIED)


def carried_files(base: Path) -> list[Path]:
    """Return the base's tokenizer, processor, chat template and license files."""
    folders = [base, *(base / name for name in _CARRIED_FOLDERS if (base / name).is_dir())]
    found = {path for folder in folders for pattern in _CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def differing_files(left: Path, right: Path) -> list[str]:
    """Return the names of the files that differ between two folders saved by the same library."""
    names = sorted({path.name for folder in (left, right) for path in folder.iterdir() if path.is_file()})
    return [name for name in names if _content(left / name) != _content(right / name)]


def _content(path: Path) -> object:
    if not path.is_file():
        return ABSENT
    if path.suffix != ".json":
        return path.read_bytes()
    return {key: value for key, value in read_json(path).items() if key not in _TOKENIZER_NOISE}


def copy_files(files: list[Path], source: Path, output_dir: Path) -> None:
    """Copy files of `source` byte for byte (a link is followed: Hub-cache snapshots are links)."""
    for path in files:
        target = output_dir / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
