"""Short forms of results for people: one line at a prompt, a table in a notebook.

A dataclass prints everything that it holds, and a repair or a measurement holds whole files and thousands of times.
"""

from __future__ import annotations

import enum
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Final

_TEXT: Final = 80
"""Letters of a text before it is cut."""


class ShortRepr:
    """A base of dataclasses (made with `repr=False`) whose `repr` is one line, without what is empty."""

    def __repr__(self) -> str:
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        said = [f"{name}={_short(value)}" for name, value in found.items() if not _is_empty(value)]
        return f"{type(self).__name__}({', '.join(said)})"


class HtmlTable(ShortRepr):
    """A base of results that notebooks show as a table, under their one line."""

    def table_rows(self) -> Sequence[Mapping[str, object]]:
        """Return the table's rows; all have the same columns."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        rows = self.table_rows()
        title = f"<p><code>{html.escape(repr(self))}</code></p>"
        if not rows:
            return f"{title}<p>nothing</p>"
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def _short(value: object) -> str:
    if isinstance(value, os.PathLike):
        return _cut(repr(os.fspath(value)))
    if isinstance(value, enum.Enum):
        return repr(value.value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"<{len(value)} entries>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"<{len(value)} {'item' if len(value) == 1 else 'items'}>"
    return repr(value) if isinstance(value, ShortRepr) else _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 3]}..."
