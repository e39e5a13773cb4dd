"""The errors that the package raises on purpose, as a tree, and the exit codes of the commands."""

from __future__ import annotations

import inspect
from typing import Final

from grpo_toolkit import errors
from grpo_toolkit.cli.main import EXIT_PIPE
from grpo_toolkit.cli.shell import EXIT_FINDINGS, EXIT_INPUT
from scripts.docs.pages.markdown import plain, table

EXIT_CODES: Final = (
    (0, "The command did what was asked; nothing was found, or the gate was kept."),
    (EXIT_FINDINGS, "The doctor found something, a check failed, or a gate was missed."),
    (EXIT_INPUT, "The arguments are wrong, or the input cannot be read. Nothing was changed."),
    (130, "You interrupted the command. Nothing half-written is left."),
    (EXIT_PIPE, "The program that read the output closed it early, as `head` does."),
)
INTRODUCTION: Final = """# Errors and exit codes

An error of a command is one line on standard error. It says which path or option, what was found, what was expected
and what to do. From Python the same errors are exceptions, and all of them are `GrpoToolkitError`.

What to do about a message: [Troubleshooting](../troubleshooting.md).
"""


def errors_page() -> str:
    """Return the exit codes and the tree of errors, each with its meaning."""
    codes = table(("code", "meaning"), ((str(code), meaning) for code, meaning in EXIT_CODES))
    tree = table(("error", "is also a", "meaning"), map(_row, error_classes()))
    return f"{INTRODUCTION}\n## Exit codes\n\n{codes}\n\n## Errors\n\n{tree}\n"


def error_classes() -> list[type[errors.GrpoToolkitError]]:
    """Return the errors in the order of their module."""
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [kind for kind in found if issubclass(kind, errors.GrpoToolkitError)]


def _row(kind: type[errors.GrpoToolkitError]) -> tuple[str, str, str]:
    return f"`{kind.__name__}`", f"`{kind.__base__.__name__}`", plain(inspect.getdoc(kind) or "")
