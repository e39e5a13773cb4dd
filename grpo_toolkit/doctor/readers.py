"""The readers of a model folder, and which of them a fault concerns.

A rule says who fails in a line such as "transformers<4.52; vllm; sglang@<5": items by reader, each with bounds on its
version where only some fail; `@` gives bounds on the transformers that a server runs on, for files that it reads
through that library. What is installed is found by the names of its metadata, without importing it.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from grpo_toolkit.errors import InputError

ALL: Final = "transformers; vllm; sglang"
"""Every reader fails."""
TRANSFORMERS: Final = "transformers"
SERVERS: Final = "vllm; sglang"
TRAINER: Final = "trainer"
"""Nobody who asks the model: only a resume of its training."""
V4: Final = "transformers<5; vllm@<5; sglang@<5"
"""Forms of transformers 5 that 4.x cannot read, whoever runs on it."""

_NAMES: Final = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "trainer": "Trainer (a resume)"}
_CHOICES: Final = ("transformers", "vllm", "sglang")
_ITEM: Final = re.compile(r"(?P<name>[a-z]+)(?P<on>@?)(?P<bounds>(?:(?:==|>=|<)[0-9.]+)*)")
_BOUND: Final = re.compile(r"(==|>=|<)([0-9.]+)")
_WORDS: Final = {"<": "before ", ">=": "since ", "==": ""}

Version = tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """A library that reads a folder; `version` is empty where it is any."""

    name: str
    version: Version = ()
    transformers: Version = ()

    def __str__(self) -> str:
        version = ".".join(map(str, self.version))
        return f"{_NAMES[self.name]} {version}" if version else _NAMES[self.name]


def parse_reader(text: str) -> Reader:
    """Return the reader that a caller names: "transformers==4.49", "vllm".

    Raises:
        InputError: no such reader.
    """
    name, _, version = text.strip().lower().partition("==")
    if name not in _CHOICES or (version and not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version)):
        raise InputError(
            f"--for {text}: expected one of {', '.join(_NAMES)}, with a version such as transformers==4.49"
        )
    installed = installed_version("transformers")
    if name == "transformers":
        own = _numbers(version) if version else installed
        return Reader(name, own, own)
    return Reader(name, _numbers(version) if version else installed_version(name), installed)


def installed_reader() -> Reader | None:
    """Return the transformers that is installed beside us, or None."""
    version = installed_version("transformers")
    return Reader("transformers", version, version) if version else None


@lru_cache(maxsize=4)
def installed_version(name: str) -> Version:
    """Return the version of an installed distribution, or () where it is not here.

    By the name of its metadata folder alone: importlib.metadata would take as long as the rest of a diagnosis.
    https://packaging.python.org/en/latest/specifications/recording-installed-packages/
    """
    fits = re.compile(rf"{name}-([0-9]+(?:\.[0-9]+)*).*\.dist-info").fullmatch
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208 - half the time of Path.iterdir
        except OSError:
            continue
        for found in filter(None, map(fits, names)):
            return _numbers(found.group(1))
    return ()


@lru_cache(maxsize=16)
def installed_knows(model_type: str) -> bool | None:
    """Return whether the installed transformers has a config class for a model type; None where none is installed.

    Its own tables are asked, as text: `CONFIG_MAPPING_NAMES`, which transformers 5 keeps in a file of its own.
    """
    for folder in sys.path:
        auto = os.path.join(folder or ".", "transformers", "models", "auto")  # noqa: PTH118 - as above
        if os.path.isdir(auto):  # noqa: PTH112
            return any(f'("{model_type}", "' in _text(os.path.join(auto, name)) for name in _TABLES)  # noqa: PTH118
    return None


def installed_defaults(model_type: str, key: str) -> tuple[Any, ...]:
    """Return the defaults that a family's config classes in the installed transformers give a setting, read as text.

    A file has a class for each part of the model, so there may be several; none where it cannot be told.
    """
    found = []
    pattern = re.compile(rf"^ +{re.escape(key)}(?:: [^=\n]+)? ?= ?([^\n]+?),?$", re.MULTILINE)
    for literal in pattern.findall(_config_source(model_type)):
        try:
            found.append(ast.literal_eval(literal))
        except (ValueError, SyntaxError):
            return ()
    return tuple(found)


def installed_allows_null(model_type: str, level: tuple[str, ...], key: str) -> bool:
    """Return whether the installed config classes take null for a setting; True where they do not say (4.x).

    A nested config is of the family's text or vision class, the top one of any but the vision class.
    """
    part = {"text_config": "Text", "vision_config": "Vision"}.get(level[0] if level else "", "")
    classes = [text for text in re.split(r"(?m)^(?=class )", _config_source(model_type)) if text.startswith("class ")]
    names = [(text.partition("(")[0], text) for text in classes]
    chosen = [text for name, text in names if (part in name if part else "Vision" not in name)]
    field = re.compile(rf"^    {re.escape(key)}: ([^=\n]+?)(?: =|$)", re.MULTILINE)
    types = [one for text in chosen for one in field.findall(text)]
    return not types or any(word in one for one in types for word in ("None", "Optional", "Any"))


@lru_cache(maxsize=4)
def _config_source(model_type: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]{1,60}", model_type):
        return ""
    for folder in sys.path:
        for name in (model_type, model_type.removesuffix("_text")):
            file = f"configuration_{name}.py"
            text = _text(os.path.join(folder or ".", "transformers", "models", name, file))  # noqa: PTH118
            if text:
                return text
    return ""


_TABLES: Final = ("auto_mappings.py", "configuration_auto.py")


@lru_cache(maxsize=4)
def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


def concerns(fails: str, reader: Reader) -> bool:
    """Return whether a fault that concerns the readers in `fails` concerns this one; an unknown version counts."""
    for item in _items(fails):
        version = reader.transformers if item["on"] else reader.version
        if item["name"] == reader.name and all(_holds(version, *bound) for bound in _BOUND.findall(item["bounds"])):
            return True
    return False


def in_words(fails: str, installed: Reader | None = None) -> str:
    """Return the readers that fail, in words, and whether the installed one is among them."""
    if fails == ALL:
        return "every reader"
    words: list[str] = []
    on: dict[str, list[str]] = {}
    for item in _items(fails):
        bounds = _bounds(item["bounds"])
        name = _NAMES[item["name"]]
        if item["on"]:
            on.setdefault(bounds, []).append(name)
        else:
            words.append(" ".join(filter(None, (name, bounds))))
    words += [f"{' and '.join(names)} on transformers {bounds}" for bounds, names in on.items()]
    said = ", ".join(words)
    if installed is not None and not concerns(fails, installed):
        said += f"; fine in the installed {installed}"
    return said


def _bounds(text: str) -> str:
    return " and ".join(f"{_WORDS[sign]}{version}" for sign, version in _BOUND.findall(text))


@lru_cache(maxsize=64)
def _items(fails: str) -> tuple[dict[str, str], ...]:
    found = [_ITEM.fullmatch(item.strip()) for item in fails.split(";")]
    assert all(found), fails
    return tuple(item.groupdict() for item in found if item)


def _holds(version: Version, sign: str, bound: str) -> bool:
    if not version:
        return True
    limit = _numbers(bound)
    ours = version[: max(len(limit), 2)]
    return {"<": ours < limit, "==": ours == limit, ">=": ours >= limit}[sign]


def _numbers(text: str) -> Version:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
