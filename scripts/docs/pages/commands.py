"""The commands, from their parsers: what each is for, its arguments with their defaults, and its examples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from grpo_toolkit.cli import run
from grpo_toolkit.cli.main import GROUPS, VERBS, build_parser
from scripts.docs.pages.markdown import plain, sentence, table

if TYPE_CHECKING:
    from collections.abc import Mapping

INTRODUCTION: Final = """# Commands

    grpo-toolkit COMMAND --help

Standard output is data and standard error is talk: `grpo-toolkit COMMAND --json > FILE` writes one JSON object and
nothing else. [What an exit code means](errors.md#exit-codes).
"""


def commands_page() -> str:
    """Return every command by what it is for, and the launcher of scripts that cannot be edited."""
    parsers = command_parsers()
    parts = [INTRODUCTION]
    for group, verbs in GROUPS.items():
        parts.append(f"To {group}: {', '.join(f'[`{name}`](#{name})' for name in verbs)}.\n")
    parts += [_command(name, f"grpo-toolkit {name}", parser) for name, parser in parsers.items()]
    launcher = run.build_parser()
    parts.append(_command("python -m grpo_toolkit.cli.run", launcher.prog, launcher))
    return "\n".join(parts)


def command_parsers() -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name, in the order of the help."""
    groups = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    found: Mapping[str, argparse.ArgumentParser] = groups[0].choices
    return {verb: found[verb] for verb in VERBS}


def _command(title: str, call: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    positional = [action for action in actions if not action.option_strings]
    options = [action for action in actions if action.option_strings]
    usage = " ".join([call, *map(_placeholder, positional), *(["[OPTIONS]"] if options else [])])
    parts = [f"## {title}", "", sentence(parser.description or ""), "", f"    {usage}", ""]
    if positional:
        rows = ([f"`{_placeholder(action)}`", _help(action)] for action in positional)
        parts += [table(("argument", "meaning"), rows), ""]
    if options:
        rows = ([_flags(action), _default(action), _help(action)] for action in options)
        parts += [table(("option", "default", "meaning"), rows), ""]
    head, _, examples = (parser.epilog or "").partition("examples:\n")
    if head.strip():
        parts += [sentence(" ".join(head.split())), ""]
    if examples:
        parts += ["Examples:", "", *(f"    {line.strip()}" for line in examples.splitlines() if line.strip()), ""]
    return "\n".join(parts)


def _placeholder(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper()) if not isinstance(action.metavar, tuple) else action.metavar[0]
    wanted = {"*": f"[{name} ...]", "?": f"[{name}]", "+": f"{name} [{name} ...]"}
    return wanted.get(str(action.nargs), name)


def _flags(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        value = " " + (f"{{{','.join(map(str, action.choices))}}}" if action.choices else _placeholder(action))
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def _default(action: argparse.Action) -> str:
    value = action.default
    if action.nargs == 0 or value is None or value is argparse.SUPPRESS or value in ([], ()):
        return "off" if action.nargs == 0 else "-"
    shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"`{shown}`" if shown else "-"


def _help(action: argparse.Action) -> str:
    return plain((action.help or "") % {**vars(action), "prog": "grpo-toolkit"})
