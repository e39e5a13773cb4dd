"""The manual: pages made from the code, and pages of the repository that stand outside of `docs/`.

`pages()` returns all of them without mkdocs; `mkdocs_hooks.py` adds them to the files in `docs/`.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final

from scripts.docs.pages import api, checks, commands, environment, errors, files, findings, notebooks
from scripts.docs.pages.markdown import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GENERATED: Final[Mapping[str, Callable[[], str]]] = {
    "reference/commands.md": commands.commands_page,
    "reference/callbacks.md": api.callbacks_page,
    "reference/api.md": api.api_page,
    "reference/findings.md": findings.findings_page,
    "reference/files.md": files.files_page,
    "reference/environment.md": environment.environment_page,
    "reference/errors.md": errors.errors_page,
    "notebooks/slow_after_grpo.md": notebooks.slow_after_grpo_page,
}
"""The page of the site that each function makes."""

TAKEN: Final = {
    "recipes/README.md": "start/recipe.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
"""The page of the site that a file of the repository becomes."""

_LINK: Final = re.compile(
    r"""(?P<head>\]\(|(?:src|srcset|href)=")(?P<target>[^)"#\s]+)(?P<anchor>#[^)"\s]*)?(?P<end>[)"])"""
)
_TEXT: Final = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)#\s]+)(?:#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Return the text of every page that is not a file in `docs/`, by its place in the site.

    Raises:
        ValueError: a page that is a file tells otherwise than the code.
    """
    checks.hold_table()
    made = {place: make() for place, make in GENERATED.items()}
    for file, place in TAKEN.items():
        made[place] = relinked((ROOT / file).read_text(encoding="utf-8"), file, place)
    return made


def relinked(text: str, file: str, place: str) -> str:
    """Return a file's text with links that hold in the site; a link to a file that is not in it becomes its text.

    Args:
        text: Markdown.
        file: path in the repository, which relative links start from.
        place: of the page in the site.
    """

    def unlinked(match: re.Match[str]) -> str:
        is_page = _in_site(match["target"], file) is not None
        return match[0] if is_page else f"`{match['text'].strip('`')}`"

    def moved(match: re.Match[str]) -> str:
        target = _in_site(match["target"], file)
        if target is None:
            return match[0]
        if target != match["target"]:
            target = posixpath.relpath(target, posixpath.dirname(place) or ".")
        return f"{match['head']}{target}{match['anchor'] or ''}{match['end']}"

    return _LINK.sub(moved, _TEXT.sub(unlinked, text))


def _in_site(target: str, file: str) -> str | None:
    """Return a link's place in the site, an address as it is, and None for a file that is not in the site."""
    if "://" in target or target.startswith("mailto:"):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    if path in TAKEN:
        return TAKEN[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None
