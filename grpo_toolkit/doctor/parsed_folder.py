"""A model folder as the rules see it: parsed, of a known kind, with what a comparison of bytes gave.

Nothing in it is trusted: values may be of any type at any key, so the rules ask through `Folder.get`, which gives
ABSENT where the way to a key is not made of objects.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    WEIGHTS_INDEX,
    Kind,
)
from grpo_toolkit.checkpoint.json_files import ABSENT, JsonObject
from grpo_toolkit.checkpoint.model_families import family_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from grpo_toolkit.checkpoint.folders.look_around import Place
    from grpo_toolkit.checkpoint.model_families import Family
    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.planned_files import Entry

PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""The steps of a tokenizer beside its model: https://huggingface.co/docs/tokenizers/components"""
TEMPLATE_JSON: Final = "chat_template.json"
TEMPLATE_JINJA: Final = "chat_template.jinja"

MIB = 2**20
JSON_LIMITS: Final = {
    CONFIG: 2 * MIB,
    GENERATION_CONFIG: MIB,
    ADAPTER_CONFIG: MIB,
    PREPROCESSOR: MIB // 2,
    PROCESSOR: MIB // 2,
    VIDEO_PREPROCESSOR: MIB // 2,
    TEMPLATE_JSON: MIB,
    TOKENIZER_CONFIG: 4 * MIB,
    WEIGHTS_INDEX: 32 * MIB,
}
"""The JSON files that rules read, with the most bytes that each may have (published ones stay under a quarter)."""

_TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Folder:
    """A parsed model folder, made by `parse.read_folder`."""

    path: Path
    kind: Kind
    entries: Mapping[str, Entry]
    objects: Mapping[str, JsonObject]
    refused: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    marked: frozenset[str] = frozenset()
    jinja: str | None = None
    added_tokens: Mapping[str, int] | None = None
    tokenizer: Tokenizer | None = None
    truncation: JsonObject | None = None
    """The truncation with which the tokenizer was saved."""
    card: str = ""
    shards: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    place: Place | None = None
    """The place of the weights: here, or the shards of a layout that are here, below or above."""
    base: Folder | None = None
    base_name: str = ""
    """The name of its base that is written in its files."""
    digests: Digests | None = None
    below: Path | None = None
    """The folder that was asked about, where it is nothing itself and this one lies in it."""
    is_known: bool | None = None
    """True where the installed transformers has a class for its model type; None where that is not known."""

    def get(self, file: str, *path: str) -> Any:
        """Return the value at `path` in the JSON file `file`, or ABSENT."""
        node: Any = self.objects.get(file, ABSENT)
        for key in path:
            node = node.get(key, ABSENT) if isinstance(node, dict) else ABSENT
        return node

    def has(self, name: str) -> bool:
        """Return whether there is a file (not a folder) of that name, readable or not."""
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
        """The row of this model's family, or None for one that transformers 4 does not know."""
        family = family_of(self.model_type)
        return family if family.is_in_v4 else None

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
        """Yield the config and every object nested in it, each with the path to it."""
        root = self.objects.get(file)
        todo: list[tuple[tuple[str, ...], JsonObject]] = [] if root is None else [((), root)]
        while todo:
            here, node = todo.pop()
            yield here, node
            todo.extend(((*here, key), value) for key, value in reversed(node.items()) if isinstance(value, dict))

    def text_value(self, key: str) -> Any:
        """Return a setting of the text model: from `text_config` where it has it, else from the top."""
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

    @property
    def processor_class(self) -> str:
        """The class of the processor, by the first file that names one; empty where none does."""
        named = (self.get(file, "processor_class") for file in (PROCESSOR, PREPROCESSOR, TOKENIZER_CONFIG))
        return next((name for name in named if isinstance(name, str)), "")

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


def token_text(value: Any) -> str | None:
    """Return the text of a special token, named by itself or as an AddedToken; None of anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def plain_shards(weight_map: Mapping[str, Any]) -> list[str]:
    """Return the shard names of an index that are plain names of a file in the folder."""
    names = {name for name in weight_map.values() if isinstance(name, str)}
    return sorted(name for name in names if is_plain(name))


_OTHER_WEIGHTS: Final = ("adapter_", "optimizer", "consolidated", "training_", "rng_", "scheduler")


def unnamed_weights(entries: Mapping[str, Entry]) -> list[str]:
    """Return the safetensors files of a model in which no `model.safetensors` and no index names one."""
    return sorted(
        name
        for name, entry in entries.items()
        if name.endswith(".safetensors") and not name.startswith(_OTHER_WEIGHTS) and not entry.is_folder
    )


def is_plain(name: str) -> bool:
    """Return whether a name from an index stays in the folder: it is no path, and printable."""
    return name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..") and len(name) < 256


def describe(folder: Folder) -> tuple[str, ...]:
    """Return what else was recognised, in a few words each."""
    facts = []
    if folder.is_trainer_checkpoint:
        has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in folder.entries)
        facts.append("trainer checkpoint with optimizer" if has_optimizer else "trainer checkpoint")
    if folder.has(MANIFEST):
        facts.append("export of grpo_toolkit")
    if folder.model_type.isprintable() and folder.model_type:
        facts.append(folder.model_type[:60])
    if re.search(r"^[ \t]*-[ \t]*trl[ \t]*$", folder.card, re.MULTILINE):
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


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The facts of a tokenizer.json.

    Attributes:
        fault: the reason why the library cannot read it; empty where it can.
        key: the part that is at fault.
        parts: its normalizer, pre-tokenizer, post-processor and decoder.
        unknown: special tokens that its config names and that neither its vocabulary nor its added tokens have.
        size: the number of its ids, so the id that a token gets which is added to it.
        has_added: whether it has a list of added tokens, be it empty.
    """

    fault: str = ""
    key: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)
    unknown: frozenset[str] = frozenset()
    size: int = 0
    has_added: bool = True


@dataclass(frozen=True, kw_only=True)
class Digests:
    """The outcome of comparing bytes.

    Attributes:
        heads_differ: a stored head has other bytes than the embedding.
        compared: how many tensors could be compared with the base's.
        is_the_base: all of them are equal, and there was at least one.
        is_zero: every second factor of an adapter is zero.
        empty: tensors that are one value throughout (all zero, most often) where they should not be.
        broken: tensors with a NaN or an infinity in them.
        unlike: tensors whose values have nothing in common with the base's under the same name, each with the name
            under which the base has those values, or an empty one.
    """

    heads_differ: bool = False
    compared: int = 0
    is_the_base: bool = False
    is_zero: bool = False
    empty: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    unlike: Mapping[str, str] = field(default_factory=dict)
