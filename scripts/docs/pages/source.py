"""Facts that stand in the package's source: constants and calls, read without importing what needs torch."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import TYPE_CHECKING

from scripts.docs.pages.markdown import PACKAGE, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@lru_cache(maxsize=512)
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_path(name: str) -> Path:
    """Return the file of a module of the package, named without the package: "latency.rows.store".

    Raises:
        ValueError: there is none.
    """
    base = PACKAGE.joinpath(*name.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        raise ValueError(f"no module {name} at {path}")
    return path


def constants(tree: ast.AST) -> dict[str, str]:
    """Return the names that a module or function sets to a text; a path of texts counts, with slashes."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        parts = value.args if isinstance(value, ast.Call) and ast.unparse(value.func) == "Path" else [value]
        texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if isinstance(target, ast.Name) and texts and len(texts) == len(parts):
            found[target.id] = "/".join(texts)
    return found


def constant(module: str, name: str) -> str:
    """Return a text that a module of the package calls by a name.

    Raises:
        ValueError: it does not.
    """
    found = constants(tree_of(module_path(module)))
    if name not in found:
        raise ValueError(f"no text {name} in grpo_toolkit.{module}")
    return found[name]


def calls(tree: ast.AST, function: str) -> Iterator[ast.Call]:
    """Yield the calls of a function or method, by the last part of its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == function:
            yield node


def sources(*folders: str) -> list[Path]:
    """Return the Python files of folders of the repository, in a fixed order."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
