"""Mutated model folders for the fuzz tests: in memory, aware of the structure of JSON files and headers."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from grpo_toolkit.doctor.planned_files import Entry
from tests.support.memory_files import MemoryFiles, put_header

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = (
    "base", "vlm_r1_449", "easyr1_merger_451", "trl_grpo_523", "trl_lora_523", "peft_prefixes_457", "fsdp_full_523",
    "fsdp_sharded_523", "zero3_ungathered_523", "sharded",
)  # fmt: skip
FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "README.md",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors", "model-1.safetensors",
    "trainer_state.json",
)  # fmt: skip
ODD = (
    None, True, False, 0, -1, 1, 10**30, 2**63, 1e308, float("inf"), float("nan"), "", "x", "\ud800", "\x1b[2J\n",
    "true", "../../../etc/passwd", "/etc/passwd", "a\0b", "..", "model.safetensors", "bfloat16", "F32", "x" * 3000,
    [], {}, [None], ["a", 1], {"": {}}, {"use_cache": False}, {"use_cache": None, "text_config": {}}, [0, 10**18],
)  # fmt: skip
ODD_KEYS = (
    "use_cache", "text_config", "eos_token_id", "", "\ud800", "lm_head.weight", "__metadata__", "_orig_mod.x", "a" * 9,
)  # fmt: skip
WHOLE = (
    b"", b"null", b"[]", b"{}", b"7", b'"text"', b"\xef\xbb\xbf{}", b'{"a":' * 3000, b"\x80\x04pickle", b"{  ",
    json.dumps({"a": 1}).encode("utf-16"), struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{}",
)  # fmt: skip
STRANGE = (
    Entry(is_folder=True, is_regular=False), Entry(is_regular=False), Entry(leaves=True),
    Entry(is_regular=False, leaves=True),
)  # fmt: skip
ODD_NAMES = ("\ud800", "a\nb", "-rf", "checkpoint-2", "pytorch_model.bin", "global_step1", "pytorch_model_fsdp_0")


Mutation = tuple[str, int, int, int]
"""A kind of mutation, and three numbers that choose where and with what, each modulo what there is."""


def mutate(files: MemoryFiles, mutation: Mutation) -> None:
    """Do one thing to a folder, in place."""
    action, where, place, what = mutation
    names = sorted(files.contents)
    if names:
        ACTIONS[action](files, names[where % len(names)], place, what)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a JSON value, without recursion."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            todo.append(node[key])
    return found


def _edit_json(files: MemoryFiles, name: str, place: int, edit: Callable[[Any, Any], None]) -> None:
    raw = files.contents[name]
    is_header = name.endswith(".safetensors")
    try:
        value = json.loads(raw[8:] if is_header else raw)
    except (ValueError, RecursionError):
        return
    nodes = _nodes(value)
    if nodes:
        edit(*nodes[place % len(nodes)])
    if is_header:
        put_header(files, name, value, data=max(0, files.sizes.get(name, len(raw)) - len(raw)))
    else:
        files.contents[name] = json.dumps(value).encode()


def _replace(files: MemoryFiles, name: str, place: int, what: int) -> None:
    def edit(node: Any, key: Any) -> None:
        node[key] = ODD[what % len(ODD)]

    _edit_json(files, name, place, edit)


def _delete(files: MemoryFiles, name: str, place: int, what: int) -> None:
    def edit(node: Any, key: Any) -> None:
        del node[key]

    _edit_json(files, name, place, edit)


def _rename_key(files: MemoryFiles, name: str, place: int, what: int) -> None:
    def edit(node: Any, key: Any) -> None:
        if isinstance(node, dict):
            node[ODD_KEYS[what % len(ODD_KEYS)]] = node.pop(key)

    _edit_json(files, name, place, edit)


def _number(files: MemoryFiles, name: str, place: int, what: int) -> None:
    def edit(node: Any, key: Any) -> None:
        if isinstance(node[key], int):
            node[key] += (-1, 1, -(2**62), 2**62, 2**70)[what % 5]

    _edit_json(files, name, place, edit)


def _bytes(files: MemoryFiles, name: str, place: int, what: int) -> None:
    raw = files.contents[name]
    at = place % (len(raw) + 1)
    pieces = (b"\0", b"\xff\xfe", b'"', b"{", b"}", b"[" * 2000, b"\xef\xbb\xbf", b"9" * 5000, b'"a":1,"a":2,', b"")
    files.contents[name] = raw[:at] + pieces[what % len(pieces)] + raw[at + what % 3 :]


def _cut(files: MemoryFiles, name: str, place: int, what: int) -> None:
    if what % 2 and name in files.sizes:
        files.sizes[name] = place % (2 * files.sizes[name] + 1)
    else:
        files.contents[name] = files.contents[name][: place % (len(files.contents[name]) + 1)]


def _whole(files: MemoryFiles, name: str, place: int, what: int) -> None:
    files.contents[FILES[place % len(FILES)] if what % 3 == 0 else name] = WHOLE[what % len(WHOLE)]


def _remove(files: MemoryFiles, name: str, place: int, what: int) -> None:
    del files.contents[name]


def _move(files: MemoryFiles, name: str, place: int, what: int) -> None:
    target = FILES[place % len(FILES)]
    files.contents[target] = files.contents.pop(name)
    if name in files.sizes:
        files.sizes[target] = files.sizes.pop(name)


def _make_strange(files: MemoryFiles, name: str, place: int, what: int) -> None:
    odd = ODD_NAMES[place % len(ODD_NAMES)]
    files.strange[odd if what % 2 else name] = STRANGE[what % len(STRANGE)]


ACTIONS: dict[str, Callable[[MemoryFiles, str, int, int], None]] = {
    "replace": _replace,
    "delete": _delete,
    "rename-key": _rename_key,
    "number": _number,
    "bytes": _bytes,
    "cut": _cut,
    "whole": _whole,
    "remove": _remove,
    "move": _move,
    "strange": _make_strange,
}

numbers = st.integers(0, 2**16 - 1)
mutations = st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), numbers, numbers, numbers), min_size=1, max_size=4)
