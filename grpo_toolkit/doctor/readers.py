"""The readers of a model folder, and which of them a fault concerns.

A rule says who fails in a line such as "transformers<4.52; vllm; sglang@<5": items by reader, each with bounds on its
version where only some fail; `@` gives bounds on the transformers that a server runs on, for files that it reads
through that library. What is installed is found by the names of its metadata, without importing it.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from grpo_toolkit.errors import InputError

ALL: Final = "transformers; vllm; sglang"
"""Every reader fails."""
TRANSFORMERS: Final = "transformers"
SERVERS: Final = "vllm; sglang"
TRAINER: Final = "trainer"
"""Nobody who asks the model: only a resume of its training."""
V4: Final = "transformers<5; vllm@<5; sglang@<5"
"""Forms of transformers 5 that 4.x cannot read, whoever runs on it."""

SINCE_5: Final = "transformers>=5; vllm@>=5; sglang@>=5"
"""Forms that transformers 5 reads otherwise, or checks as no older release does."""

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


@lru_cache(maxsize=32)
def installed_text(path: str) -> str:
    """Return a file of an installed package, such as "peft/utils/constants.py"; empty where it is not here."""
    return next(filter(None, (read_text(f"{folder or '.'}/{path}") for folder in sys.path)), "")


def read_text(path: str) -> str:
    """Return a file's text; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - half the time of Path
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


def without(fails: str, name: str) -> str:
    """Return whom a fault concerns besides one reader; as it was where that one alone is concerned."""
    return "; ".join(item.strip() for item in fails.split(";") if not item.strip().startswith(name)) or fails


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
