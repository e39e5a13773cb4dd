"""A model folder as the rules see it: parsed, its kind recognised, nothing trusted.

Nothing here raises for what is in the folder: what cannot be read is kept with its reason in `refused`, for a rule to
report. Values may be of any type at any key, so the rules ask through `Folder.get`, which gives ABSENT where the way
to a key is not made of objects.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from grpo_toolkit.doctor.families import FAMILIES, Family
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.reading import ABSENT, MAX_TENSORS, JsonObject, TensorInfo, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from grpo_toolkit.doctor.digests import Digests
    from grpo_toolkit.doctor.files import Entry, Files

PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
TOKENIZER: Final = "tokenizer.json"
TEMPLATE_JSON: Final = "chat_template.json"
TEMPLATE_JINJA: Final = "chat_template.jinja"

_MIB = 2**20
JSON_LIMITS: Final = {
    CONFIG: 2 * _MIB,
    GENERATION_CONFIG: _MIB,
    ADAPTER_CONFIG: _MIB,
    PREPROCESSOR: _MIB,
    PROCESSOR: _MIB,
    VIDEO_PREPROCESSOR: _MIB,
    TEMPLATE_JSON: _MIB,
    TOKENIZER_CONFIG: 4 * _MIB,
    WEIGHTS_INDEX: 32 * _MIB,
}
"""The JSON files that rules read, with the most bytes that each may have (published ones stay under a quarter)."""

_CONTAINERS: Final = 200_000
_TOKENIZER_HEAD: Final = 4 * _MIB
_README_HEAD: Final = 16 * 1024
_TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Kind(enum.Enum):
    """What a folder holds."""

    MODEL = "full model"
    ADAPTER = "adapter"
    FSDP = "sharded FSDP checkpoint"
    DEEPSPEED = "DeepSpeed ZeRO checkpoint"


@dataclass(frozen=True, kw_only=True, eq=False)
class Folder:
    """A parsed model folder. Make one with `read_folder`."""

    path: Path
    kind: Kind
    entries: Mapping[str, Entry]
    objects: Mapping[str, JsonObject]
    refused: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    marked: frozenset[str] = frozenset()
    jinja: str | None = None
    added_tokens: Mapping[str, int] | None = None
    card: str = ""
    shards: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    base: Folder | None = None
    digests: Digests | None = None

    def get(self, file: str, *path: str) -> Any:
        """The value at `path` in the JSON file `file`, or ABSENT."""
        node: Any = self.objects.get(file, ABSENT)
        for key in path:
            node = node.get(key, ABSENT) if isinstance(node, dict) else ABSENT
        return node

    def has(self, name: str) -> bool:
        """Whether there is a file (not a folder) of that name, readable or not."""
        entry = self.entries.get(name)
        return entry is not None and not entry.is_folder

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @cached_property
    def model_type(self) -> str:
        value = self.get(CONFIG, "model_type")
        return value if isinstance(value, str) else ""

    @cached_property
    def family(self) -> Family | None:
        """The row of data about this model's family, or None for one that we know nothing of."""
        return FAMILIES.get(self.model_type)

    @cached_property
    def is_generative(self) -> bool:
        names = self.get(CONFIG, "architectures")
        known = names if isinstance(names, list) else []
        suffixes = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForVision2Seq")
        return any(isinstance(name, str) and name.endswith(suffixes) for name in known)

    @cached_property
    def is_multimodal(self) -> bool:
        return isinstance(self.get(CONFIG, "vision_config"), dict)

    @cached_property
    def has_tokenizer(self) -> bool:
        return any(self.has(name) for name in _TOKENIZER_FILES)

    @cached_property
    def has_pickles(self) -> bool:
        return any(
            name.endswith((".bin", ".pt", ".pth")) and name.startswith(("pytorch_", "model")) for name in self.entries
        )

    @cached_property
    def is_trainer_checkpoint(self) -> bool:
        return self.has("trainer_state.json")

    def levels(self, file: str = CONFIG) -> Iterator[tuple[tuple[str, ...], JsonObject]]:
        """The config and every object nested in it, each with where it sits."""
        root = self.objects.get(file)
        todo: list[tuple[tuple[str, ...], JsonObject]] = [] if root is None else [((), root)]
        while todo:
            here, node = todo.pop()
            yield here, node
            todo.extend(((*here, key), value) for key, value in reversed(node.items()) if isinstance(value, dict))

    def text_value(self, key: str) -> Any:
        """A setting of the text model: of `text_config` where there is one that says it, else of the top."""
        value = self.get(CONFIG, "text_config", key)
        return self.get(CONFIG, key) if value is ABSENT else value

    @cached_property
    def stored_dtype(self) -> str | None:
        """The dtype of most of the stored floating-point bytes, or None where no weights are known."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in ("F32", "F16", "BF16", "F64"):
                sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0] if sizes else None

    @cached_property
    def templates(self) -> dict[str, str]:
        """Every copy of the chat template by the file that holds it."""
        found: dict[str, str] = {}
        if self.jinja is not None:
            found[TEMPLATE_JINJA] = self.jinja
        for file in (TEMPLATE_JSON, TOKENIZER_CONFIG):
            value = self.get(file, "chat_template")
            if isinstance(value, str):
                found[file] = value
        return found


def read_folder(files: Files, *, base: Folder | None = None) -> Folder:
    """Read what the rules need of a folder.

    Raises:
        CheckpointError: it is no model folder of any kind.
    """
    entries = files.entries
    kind = _recognise(files.path, entries)
    refused: dict[str, str] = {}
    repeated: dict[str, tuple[str, ...]] = {}
    marked = set()
    objects = {}
    for name, limit in JSON_LIMITS.items():
        if name in entries and not entries[name].is_folder:
            try:
                raw = files.read(name, limit=limit)
                again: list[str] = []
                if name == WEIGHTS_INDEX and raw.count(b":") > 2 * MAX_TENSORS:
                    raise CheckpointError(f"{name}: names more than {MAX_TENSORS:,} tensors, which no model has")
                objects[name] = parse_json(raw, name, repeated=again, containers=_CONTAINERS)
            except CheckpointError as error:
                refused[name] = _reason(error)
                continue
            if again:
                repeated[name] = tuple(again)
            if raw.startswith(b"\xef\xbb\xbf"):
                marked.add(name)
    return Folder(
        path=files.path,
        kind=kind,
        entries=entries,
        objects=objects,
        jinja=_read_text(files, TEMPLATE_JINJA, refused),
        added_tokens=_read_added_tokens(files, objects.get(TOKENIZER_CONFIG)),
        card=_read_card(files),
        shards=_read_shards(files, kind, objects, refused),
        refused=refused,
        repeated=repeated,
        marked=frozenset(marked),
        base=base,
    )


def _reason(error: CheckpointError) -> str:
    """The error without its path, which the finding names already."""
    return str(error).partition(": ")[2] or str(error)


def _recognise(path: Path, entries: Mapping[str, Entry]) -> Kind:
    has_weights = any(name.endswith(".safetensors") for name in entries)
    if ADAPTER_CONFIG in entries:
        return Kind.ADAPTER
    if not has_weights and any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in entries):
        return Kind.FSDP
    if not has_weights and ("zero_to_fp32.py" in entries or any(name.startswith("global_step") for name in entries)):
        return Kind.DEEPSPEED
    if CONFIG in entries:
        return Kind.MODEL
    raise CheckpointError(
        f"{path}: no {CONFIG}, no {ADAPTER_CONFIG}, no FSDP or DeepSpeed shards and no checkpoint-* in it, so there "
        "is nothing to examine"
    )


def _read_text(files: Files, name: str, refused: dict[str, str]) -> str | None:
    if name not in files.entries or files.entries[name].is_folder:
        return None
    try:
        return files.read(name, limit=_MIB).decode("utf-8")
    except UnicodeDecodeError as error:
        refused[name] = f"not UTF-8 text ({error.reason})"
    except CheckpointError as error:
        refused[name] = _reason(error)
    return None


def _read_card(files: Files) -> str:
    """The YAML part of the model card, where trainers name themselves and the base."""
    if not _may_read(files, "README.md"):
        return ""
    try:
        text = files.head("README.md", limit=_README_HEAD).decode("utf-8", errors="replace")
    except CheckpointError:
        return ""
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return match.group(1) if match else ""


def _may_read(files: Files, name: str) -> bool:
    entry = files.entries.get(name)
    return entry is not None and entry.is_regular and not entry.leaves


def _read_added_tokens(files: Files, tokenizer_config: JsonObject | None) -> dict[str, int] | None:
    """Token to id for the tokens added to the vocabulary, or None where no file says it."""
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


def _read_shards(
    files: Files, kind: Kind, objects: Mapping[str, JsonObject], refused: dict[str, str]
) -> dict[str, dict[str, TensorInfo]]:
    shards = {}
    total = 0
    for name in _weight_files(files, kind, objects):
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
    weight_map = objects.get(WEIGHTS_INDEX, {}).get("weight_map")
    return plain_shards(weight_map) if isinstance(weight_map, dict) and kind is not Kind.ADAPTER else []


def plain_shards(weight_map: Mapping[str, Any]) -> list[str]:
    """The shard names of an index that are plain names of a file in the folder."""
    names = {name for name in weight_map.values() if isinstance(name, str)}
    return sorted(name for name in names if is_plain(name))


def is_plain(name: str) -> bool:
    """Whether a name from an index stays in the folder: no path, nothing that is not printable."""
    return name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..") and len(name) < 256


def describe(folder: Folder) -> tuple[str, ...]:
    """What else was recognised, for the reader."""
    facts = []
    if folder.is_trainer_checkpoint:
        has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in folder.entries)
        facts.append("trainer checkpoint with optimizer" if has_optimizer else "trainer checkpoint")
    if folder.has(MANIFEST):
        facts.append("export of grpo_toolkit")
    if folder.model_type.isprintable() and folder.model_type:
        facts.append(folder.model_type[:60])
    if re.search(r"^\s*-\s*trl\s*$", folder.card, re.MULTILINE):
        facts.append("by TRL")
    facts.append(_dialect(folder))
    if folder.tensors:
        size = sum(info.nbytes for info in folder.tensors.values())
        dtype = folder.stored_dtype or "?"
        amount = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
        facts.append(f"{len(folder.tensors):,} tensors, {amount}, mostly {dtype}")
    return tuple(fact for fact in facts if fact)


def _dialect(folder: Folder) -> str:
    for file in (CONFIG, GENERATION_CONFIG):
        version = folder.get(file, "transformers_version")
        if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,30}", version):
            return f"written by transformers {version}"
    config = folder.get(TOKENIZER_CONFIG)
    is_v5 = isinstance(config, dict) and isinstance(config.get("extra_special_tokens"), list)
    return "written by transformers 5" if is_v5 else ""
