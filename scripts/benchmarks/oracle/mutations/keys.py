"""Operators on the keys of JSON files: dropped, nulled, of another type or value, moved, renamed; classes swapped."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from scripts.benchmarks.oracle.folders import INDEX, to_json
from scripts.benchmarks.oracle.mutations.files import TRAINING
from scripts.benchmarks.oracle.mutations.operators import operator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.benchmarks.oracle.folders import Folder
    from scripts.benchmarks.oracle.mutations.operators import Mutation, Place

_NOT_BELOW: Final = ("added_tokens_decoder", "added_tokens", "model", "vocab", "weight_map", "merges")
"""Containers of entries, not of settings; the weight map has operators of its own."""
_NO_SETTINGS: Final = ("vocab.json", "grpo_toolkit.json", *TRAINING)


@lru_cache(maxsize=64)
def parsed(raw: bytes) -> Any:
    """Return JSON that is only looked at."""
    return json.loads(raw)


def _paths(node: Any, here: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*here, key)
        if key not in _NOT_BELOW:
            yield from _paths(value, (*here, key))


def keys(folder: Folder) -> Iterator[Place]:
    """Yield every key of every JSON file that says settings."""
    for name in sorted(folder):
        if name.endswith(".json") and name not in _NO_SETTINGS:
            yield from ((name, path, "") for path in _paths(parsed(folder[name])))


def value_at(content: Any, path: tuple[str, ...]) -> Any:
    """Return the value of a nested key."""
    for key in path:
        content = content[key]
    return content


def _edit(folder: Folder, made: Mutation, change: Callable[[dict[str, Any], str], None]) -> None:
    content = json.loads(folder[made.file])
    change(value_at(content, made.path[:-1]), made.path[-1])
    folder[made.file] = to_json(content)


def _where(test: Callable[[Any], bool]) -> Callable[[Folder], Iterator[Place]]:
    """Return the places whose value is such."""

    def places(folder: Folder) -> Iterator[Place]:
        for file, path, to in keys(folder):
            if test(value_at(parsed(folder[file]), path)):
                yield file, path, to

    return places


@operator(keys)
def drop_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.pop(key))


@operator(_where(lambda value: value is not None))
def null_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: None}))


def _retyped(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return 7
    return json.dumps(value)


@operator(_where(lambda value: value is not None))
def retype_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: _retyped(node[key])}))


@operator(_where(lambda value: value is not None))
def wrap_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: [node[key]]}))


@operator(_where(lambda value: isinstance(value, (str, list, dict)) and bool(value)))
def empty_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: type(node[key])()}))


@operator(_where(lambda value: isinstance(value, bool)))
def flip_key(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: not node[key]}))


@operator(_where(lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)))
def change_number(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: 2 * node[key] + 1}))


@operator(_where(lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)))
def negate_number(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: -node[key] - 1}))


@operator(_where(lambda value: isinstance(value, str) and bool(value)))
def change_text(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: node[key][::-1]}))


@operator(keys)
def rename_key(folder: Folder, made: Mutation) -> None:
    def change(node: dict[str, Any], key: str) -> None:
        node[f"{key}s" if not key.endswith("s") else key[:-1]] = node.pop(key)

    _edit(folder, made, change)


def _levels(folder: Folder) -> Iterator[Place]:
    """Yield keys with the level, up or down, that they could stand at instead."""
    for file, path, _ in keys(folder):
        content = parsed(folder[file])
        if len(path) > 1:
            yield file, path, "up"
        elif not isinstance(content[path[0]], dict):
            inner = (key for key in ("text_config", "image_processor", "rope_parameters", "size") if key in content)
            yield from ((file, path, key) for key in inner if isinstance(content[key], dict))


@operator(_levels)
def move_level(folder: Folder, made: Mutation) -> None:
    content = json.loads(folder[made.file])
    value = value_at(content, made.path[:-1]).pop(made.path[-1])
    target = value_at(content, made.path[:-2]) if made.to == "up" else content[made.to]
    target[made.path[-1]] = value
    folder[made.file] = to_json(content)


_NEIGHBOURS: Final = {
    "config.json": "generation_config.json",
    "generation_config.json": "config.json",
    "tokenizer_config.json": "special_tokens_map.json",
    "special_tokens_map.json": "tokenizer_config.json",
    "preprocessor_config.json": "processor_config.json",
    "processor_config.json": "preprocessor_config.json",
    "chat_template.json": "tokenizer_config.json",
}


def _other_files(folder: Folder) -> Iterator[Place]:
    for file, path, _ in keys(folder):
        if file in _NEIGHBOURS and len(path) == 1:
            yield file, path, _NEIGHBOURS[file]


@operator(_other_files)
def move_to_file(folder: Folder, made: Mutation) -> None:
    content = json.loads(folder[made.file])
    other = json.loads(folder.get(made.to, b"{}"))
    other[made.path[0]] = content.pop(made.path[0])
    folder[made.file], folder[made.to] = to_json(content), to_json(other)


_CLASSES: Final = {
    "architectures": ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "LlamaModel",
                      "LlamaForSequenceClassification", "PeftModelForCausalLM"),
    "model_type": ("llama", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text", "unknown_model"),
    "tokenizer_class": ("LlamaTokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "TokenizersBackend",
                        "NoSuchTokenizer"),
    "image_processor_type": ("CLIPImageProcessor", "Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast",
                             "NoSuchProcessor"),
    "processor_class": ("LlavaProcessor", "Qwen2_5_VLProcessor", "NoSuchProcessor"),
    "peft_type": ("IA3", "PREFIX_TUNING", "NO_SUCH_TYPE"),
    "task_type": ("SEQ_CLS", "FEATURE_EXTRACTION"),
    "hidden_act": ("gelu", "relu"),
    "rope_type": ("linear", "yarn", "mrope"),
    "torch_dtype": ("float16", "float64", "int8"),
    "dtype": ("float16", "float64", "int8"),
}  # fmt: skip


def _classes(folder: Folder) -> Iterator[Place]:
    for file, path, _ in keys(folder):
        for other in _CLASSES.get(path[-1], ()):
            now = value_at(parsed(folder[file]), path)
            if now is not None and now not in (other, [other]):
                yield file, path, other


@operator(_classes)
def swap_class(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: [made.to] if key == "architectures" else made.to}))


def _ids(folder: Folder) -> Iterator[Place]:
    return ((file, path, to) for file, path, to in keys(folder) if path[-1].endswith(("_token_id", "_token_index")))


@operator(_ids)
def far_id(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: 151645}))


def _tokens(folder: Folder) -> Iterator[Place]:
    return ((file, path, to) for file, path, to in keys(folder) if path[-1].endswith("_token") and len(path) == 1)


@operator(_tokens)
def unknown_token(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.update({key: "<|no such token|>"}))


def _index_entries(folder: Folder) -> Iterator[Place]:
    for name in sorted(parsed(folder[INDEX])["weight_map"]) if INDEX in folder else ():
        yield INDEX, ("weight_map", name), ""


@operator(_index_entries)
def drop_entry(folder: Folder, made: Mutation) -> None:
    _edit(folder, made, lambda node, key: node.pop(key))


@operator(_index_entries)
def misplace_entry(folder: Folder, made: Mutation) -> None:
    def change(node: dict[str, Any], key: str) -> None:
        node[key] = next((file for file in sorted(set(node.values())) if file != node[key]), "no.safetensors")

    _edit(folder, made, change)
