"""The public names, as places that mkdocstrings fills from their docstrings and signatures."""

from __future__ import annotations

import ast
from typing import Final

import grpo_toolkit
from scripts.docs.pages.markdown import plain, table
from scripts.docs.pages.source import module_path, tree_of

CALLBACKS: Final = """# Callbacks

Add them to a trainer: `GRPOTrainer(..., callbacks=[KVCacheCallback(), ...])`. Each option has its default in the
signature. An error in a callback is reported once and the training goes on. With `strict=True` it is raised when the
training has ended.
"""
API: Final = """# Python

Import these names from `grpo_toolkit`: `from grpo_toolkit import export_model`. The [callbacks](callbacks.md) and the
[errors](errors.md) have pages of their own.
"""


def callbacks_page() -> str:
    """Return the callbacks: a table of first sentences, and each whole."""
    names = _names("callback")
    rows = ([f"[`{name}`][grpo_toolkit.{name}]", _first_line(name)] for name in names)
    return "\n".join([CALLBACKS, table(("callback", "in one line"), rows), "", *map(_place, names)])


def api_page() -> str:
    """Return the other public names: functions, then classes, then those that only have another name."""
    functions, classes = _names("function"), _names("class")
    rows = ([f"`{older}`", f"[`{name}`][grpo_toolkit.{name}]"] for older, name in older_names().items())
    parts = [API, "## Functions\n", *map(_place, functions), "## Classes\n", *map(_place, classes)]
    return "\n".join([*parts, "## Older names\n", table(("older name", "name"), rows), ""])


def kinds() -> dict[str, str]:
    """Return the kind of each public name: "callback", "error", "function", "class" or "older"."""
    return {name: _kind(name) for name in grpo_toolkit.__all__}


def older_names() -> dict[str, str]:
    """Return the public names that stand for another one, with that one."""
    found = {}
    for name in _names("older"):
        node = _node(name)
        assert isinstance(node, ast.Assign)
        found[name] = ast.unparse(node.value)
    return found


def _names(kind: str) -> list[str]:
    return [name for name, found in kinds().items() if found == kind]


def _kind(name: str) -> str:
    module = grpo_toolkit._MODULES[name]
    if module in ("callbacks", "errors"):
        return module.removesuffix("s")
    node = _node(name)
    if isinstance(node, ast.Assign):
        return "older"
    return "class" if isinstance(node, ast.ClassDef) else "function"


def _node(name: str) -> ast.stmt:
    for node in tree_of(module_path(grpo_toolkit._MODULES[name])).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            imported = str(node.module).removeprefix("grpo_toolkit.")
            return next(
                one
                for one in tree_of(module_path(imported)).body
                if isinstance(one, ast.ClassDef) and one.name == name
            )
    raise ValueError(f"grpo_toolkit.{grpo_toolkit._MODULES[name]} has no {name}")


def _first_line(name: str) -> str:
    node = _node(name)
    assert isinstance(node, ast.ClassDef)
    return plain((ast.get_docstring(node) or "").partition("\n")[0])


def _place(name: str) -> str:
    return f"::: grpo_toolkit.{name}\n"
