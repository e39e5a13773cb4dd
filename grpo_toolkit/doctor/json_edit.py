"""Edits of one key in JSON text that leave every other byte as it is: order, indentation, numbers, newlines."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """A `"key": value` of an object, as places in the text."""

    key: str
    start: int
    value: int
    end: int


def set_value(text: str, path: Sequence[str], value: Any) -> str:
    """Return the text with the key at `path` set to `value`; a new key is put after the last one of its object.

    Parents that are absent, or no objects, become objects with this key alone.

    Raises:
        KeyError: the text holds no object.
    """
    while len(path) > 1 and not _has_object(text, path[:-1]):
        path, value = path[:-1], {path[-1]: value}
    start = _find_object(text, path[:-1])
    members = _members(text, start)
    for member in reversed(members):  # of a repeated key the last one counts
        if member.key == path[-1]:
            return text[: member.value] + _dump(value, _indent(text, start, members)) + text[member.end :]
    indent = _indent(text, start, members)
    addition = f"{dumps(path[-1])}: {_dump(value, indent)}"
    if not members:
        return text[: start + 1] + addition + text[start + 1 :]
    last = members[-1].end
    return f"{text[:last]},{indent or ' '}{addition}{text[last:]}"


def delete_key(text: str, path: Sequence[str]) -> str:
    """Return the text without the key at `path`; the text itself where there is no such key."""
    if not _has_object(text, path[:-1]):
        return text
    start = _find_object(text, path[:-1])
    members = _members(text, start)
    for place, member in reversed(list(enumerate(members))):
        if member.key != path[-1]:
            continue
        if place > 0:
            text = text[: members[place - 1].end] + text[member.end :]
        elif len(members) > 1:
            text = text[: member.start] + text[members[1].start :]
        else:
            text = text[: start + 1] + text[_SPACE.match(text, member.end).end() :]  # type: ignore[union-attr]
        return delete_key(text, path)
    return text


def dumps(value: Any, *, indent: int | str | None = None) -> str:
    """Return JSON text with letters as they are; a lone half of a surrogate pair, which is no UTF-8, stays escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _has_object(text: str, path: Sequence[str]) -> bool:
    try:
        _find_object(text, path)
    except KeyError:
        return not path  # what is no object at all is refused
    return True


def _find_object(text: str, path: Sequence[str]) -> int:
    """Return the offset at which the object at `path` begins."""
    start = _skip(text, 0)
    for key in path:
        places = [member.value for member in _members(text, start) if member.key == key]
        if not places:
            raise KeyError(key)
        start = places[-1]
    if text[start] != "{":
        raise KeyError(path[-1] if path else "")
    return start


def _members(text: str, start: int) -> list[Member]:
    if text[start] != "{":
        raise KeyError(text[start])
    members = []
    place = _skip(text, start + 1)
    while text[place] != "}":
        key, end = scanstring(text, place + 1)
        value = _skip(text, _skip(text, end) + 1)
        _, value_end = _DECODER.raw_decode(text, value)
        members.append(Member(key, place, value, value_end))
        place = _skip(text, value_end)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return members


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _indent(text: str, start: int, members: list[Member]) -> str:
    """Return the white space before a key of this object, newline included; empty where it is all on one line."""
    if not members:
        return ""
    space = text[start + 1 : members[0].start]
    return space if "\n" in space else ""


def _dump(value: Any, indent: str) -> str:
    if not indent or not isinstance(value, (dict, list)) or not value:
        return dumps(value)
    newline, _, columns = indent.rpartition("\n")
    unit = "\t" if columns.startswith("\t") else 2
    return dumps(value, indent=unit).replace("\n", f"{newline}\n{columns}")
