"""Notebooks as pages: their text as it is, their code in blocks, no outputs (there are none in the repository)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from scripts.docs.pages.markdown import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SLOW_AFTER_GRPO: Final = ROOT / "docs" / "notebooks" / "slow_after_grpo.ipynb"


def slow_after_grpo_page() -> str:
    """Return the notebook of a model that became slow, as a page."""
    return notebook_page(SLOW_AFTER_GRPO)


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown, with a link to itself under its title.

    Raises:
        ValueError: its first cell has no title.
    """
    first, *rest = [_shown(kind, text) for kind, text in cells_of(path)]
    title, _, after = first.partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"{path}: the first cell has no title")
    link = f"This page is a notebook: [{path.name}]({path.name})."
    return "\n\n".join((title, link, after.strip(), *rest)) + "\n"


def code_of(path: Path) -> str:
    """Return the code of a notebook as one program."""
    return "\n\n".join(text for kind, text in cells_of(path) if kind == "code") + "\n"


def cells_of(path: Path) -> list[tuple[str, str]]:
    """Return the cells of a notebook: "markdown" or "code", and the text."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]


def _shown(kind: str, text: str) -> str:
    return text if kind == "markdown" else f"```python\n{text}\n```"
