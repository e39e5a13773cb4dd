"""Parts of Markdown that the pages share: tables, and text that must not be taken for markup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT: Final = Path(__file__).resolve().parents[3]
PACKAGE: Final = ROOT / "grpo_toolkit"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a bar inside a cell does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def print_or_write(text: str, path: Path | None, *, begin: str, end: str) -> None:
    """Print a text, or write it between the two markers of a page.

    Raises:
        ValueError: the markers are not in it.
    """
    if path is None:
        print(text)
        return
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def sentence(text: str) -> str:
    """Return a text that ends with a full stop and begins with a capital, unless it begins with a name from code."""
    text = plain(text.strip())
    first = text.partition(" ")[0].rstrip(",:")
    return (
        (text[:1].upper() if first.replace("-", "").isalpha() and first.islower() else text[:1])
        + text[1:]
        + ("" if text.endswith((".", "?", "!")) else ".")
    )


def plain(text: str) -> str:
    """Return a text in which `<`, `*` and `_` stand for themselves, outside of code between backquotes."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        for mark, shown in (("<", "&lt;"), ("*", "\\*"), ("_", "\\_")):
            parts[index] = parts[index].replace(mark, shown)
    return "`".join(parts)


def _cell(text: str) -> str:
    parts = " ".join(text.split()).split("`")
    return "`".join(part if index % 2 else part.replace("|", "\\|") for index, part in enumerate(parts))
