"""The parts that commands share: exit codes, one-line errors, common flags, quiet libraries."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_FINDINGS: Final = 1
EXIT_INPUT: Final = 2

_COMPAT_HELP: Final = (
    "who must be able to read it: all (transformers 4 and servers too, whatever wrote the base) "
    "or v5 (the base's forms)"
)
READER_HELP: Final = (
    "judge for one reader: transformers, vllm or sglang, with a version if you like (transformers==4.49); without it "
    "a fault for any of them counts, and what is wrong for the installed transformers comes first"
)


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that publish a folder."""
    parser.add_argument("output", type=Path, help="the folder to publish")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export or merge")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, such as 5GB")
    parser.add_argument("--dtype", metavar="DTYPE", help="dtype of every floating-point tensor (default: the base's)")
    parser.add_argument("--compat", choices=("all", "v5"), default="all", help=_COMPAT_HELP)
    parser.add_argument("--quiet", action="store_true", help="print nothing but the folder")


def add_verb(commands: Commands, name: str, *, help: str, examples: tuple[str, ...]) -> argparse.ArgumentParser:
    """Add a command whose help says what it is for and shows three examples."""
    import argparse

    shown = "\n".join(f"  grpo-toolkit {name} {example}".rstrip() for example in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        description=f"{help[:1].upper()}{help[1:]}.",
        epilog=f"examples:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def repository(text: str) -> str:
    """Return a repository's name on the Hub; a name that the Hub cannot have is refused before anything is loaded."""
    import argparse

    if not re.fullmatch(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}", text) or ".." in text or "--" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name on the Hub, such as organisation/name")
    return text


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written into, before what is to be written has been measured.

    Raises:
        InputError: it cannot be made or written.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: nothing can be written there ({error.strerror or error})") from error


def check_attention(names: Iterable[str | None]) -> None:
    """Refuse names of attention implementations that the installed transformers does not have.

    Raises:
        InputError: an unknown name.
    """
    given = [name for name in names if name is not None and "/" not in name]  # with a slash: a kernel from the Hub
    if not given:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *ALL_ATTENTION_FUNCTIONS.keys()]
    for name in given:
        if name not in known:
            raise InputError(f"no attention implementation {name!r}; transformers here has {', '.join(known)}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "wandb_workspaces": "wandb-workspaces"}
"""Names to install where they are others than those to import."""

_MODELS_NEED: Final = ("transformers", "torch")
"""The packages that every command that loads a model needs: named together, so that one line installs both."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1", ... (default cpu)')


def check_device(device: str) -> None:
    """Refuse a device that is not on this machine.

    Raises:
        InputError: torch cannot put a tensor there.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not here ({str(error).splitlines()[0]})") from error


def quiet_libraries() -> None:
    """Keep the libraries' progress bars off the terminal; their warnings and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def missing(error: ModuleNotFoundError) -> str:
    """Return one line that says which package a command needs, and how to install it.

    Raises:
        ModuleNotFoundError: it is one of ours that is not there.
    """
    from importlib.util import find_spec

    package = (error.name or "").partition(".")[0]
    if package in ("", "grpo_toolkit"):
        raise error
    name = _DISTRIBUTIONS.get(package, package)
    together = [other for other in _MODELS_NEED if other != name and find_spec(other) is None]
    names = " ".join([name, *(together if name in _MODELS_NEED else [])])
    return f"this command needs {package}, which is not installed here: pip install {names}"


def version() -> str:
    """Return the version of the installed package."""
    from importlib import metadata

    return metadata.version("grpo-toolkit")


def fail(error: object, code: int) -> int:
    """Print an error in one line and return the exit code."""
    print(f"grpo-toolkit: {error}", file=sys.stderr)
    return code


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, with what this terminal cannot show escaped."""
    # Text of a stranger's folder may hold any character.
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, errors="backslashreplace").decode(encoding))
