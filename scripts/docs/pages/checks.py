"""The checks before an export is published: the table of a written page, held against those that the code makes."""

from __future__ import annotations

import ast
import re
from typing import Final

from scripts.docs.pages.markdown import ROOT
from scripts.docs.pages.source import calls, constants, sources, tree_of

PAGE: Final = ROOT / "docs" / "reference" / "checks.md"
_ROW: Final = re.compile(r"^\| ([^|]+) \| ", re.MULTILINE)


def hold_table() -> None:
    """Hold the page's table against the code.

    Raises:
        ValueError: the page tells of other checks than the code makes.
    """
    rows = set(_ROW.findall(PAGE.read_text(encoding="utf-8"))) - {"check", "---"}
    made = check_names()
    untold = sorted(name for name in made if not any(_is_row_of(name, row) for row in rows))
    not_made = sorted(row for row in rows if not any(_is_row_of(name, row) for name in made))
    if untold or not_made:
        raise ValueError(f"{PAGE.name}: not told {untold}, not in grpo_toolkit/export {not_made}")


def check_names() -> set[str]:
    """Return the names of the checks in `grpo_toolkit/export`; `*` stands for a part that is filled in."""
    trees = [tree_of(path) for path in sources("grpo_toolkit/export")]
    texts: dict[str, str] = {}
    for tree in trees:
        texts |= constants(tree)
    found = {
        argument.value
        for tree in trees
        for call in calls(tree, "check_tokens")
        for argument in call.args[:1]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    for tree in trees:
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            own = texts | _patterns(function) | constants(function)
            for call in calls(function, "Check"):
                name = next(word.value for word in call.keywords if word.arg == "name")
                if isinstance(name, ast.Constant):
                    found.add(str(name.value))
                elif isinstance(name, ast.Name) and name.id in own:
                    found.add(own[name.id])
    return found


def _patterns(function: ast.FunctionDef) -> dict[str, str]:
    found = {}
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.JoinedStr)
            and isinstance(node.targets[0], ast.Name)
        ):
            parts = (part.value if isinstance(part, ast.Constant) else "*" for part in node.value.values)
            found[node.targets[0].id] = "".join(map(str, parts))
    return found


def _is_row_of(name: str, row: str) -> bool:
    if "*" in name:  # "same * on the same prompts": the name of a reward
        return row.startswith(name.partition("*")[0]) and row.endswith("reward")
    return name.startswith(row)
