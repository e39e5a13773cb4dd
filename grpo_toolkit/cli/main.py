"""`grpo-toolkit`: thin commands over the library.

Standard output is data, standard error is talk. Exit codes: 0 clean, 1 a check or gate was missed, 2 wrong use or
unreadable input. Only the standard library and the module of the command that is meant are imported at start, so that
help and file-reading commands answer at once; argparse rather than a prettier library for the same reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

from grpo_toolkit.cli.shell import EXIT_FINDINGS, EXIT_INPUT, check_device, fail, missing, version
from grpo_toolkit.errors import GrpoToolkitError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.cli.shell import Commands

GROUPS: Final = {
    "publish": ("export", "merge", "verify"),
    "measure": ("bench", "tune", "explain", "report", "workspace"),
    "examine": ("doctor", "repair", "env"),
}
"""The commands by what they are for, in the order of the help."""

EXIT_PIPE: Final = 141
"""As a shell reports a command that a closed pipe ended: 128 and the number of SIGPIPE."""

VERBS: Final = tuple(verb for verbs in GROUPS.values() for verb in verbs)
"""The commands: each a module beside this one with `add_command` and a function of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's) and return the exit code."""
    first = (sys.argv[1:] if argv is None else argv)[:1]
    parser = build_parser(first if first and first[0] in VERBS else VERBS)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # with the usage of the command that was meant
        getattr(arguments, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.version:
        print(f"grpo-toolkit {version()}")
        return 0
    if getattr(arguments, "run", None) is None:
        parser.print_help(sys.stderr)
        return EXIT_INPUT
    try:
        check_device(getattr(arguments, "device", "cpu"))
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # a pipe that was closed early is met here, not when the interpreter ends
        return code
    except VerificationError as error:
        return fail(error, EXIT_FINDINGS)
    except GrpoToolkitError as error:
        return fail(error, EXIT_INPUT)
    except ModuleNotFoundError as error:  # the doctor needs nothing but this package, so it may stand alone
        return fail(missing(error), EXIT_INPUT)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:  # a full disk, a folder that may not be written: what was staged is gone again
        where = " to ".join(str(name) for name in (error.filename, error.filename2) if name)
        return fail(
            f"{where}{': ' if where else ''}{error.strerror or error}{_nothing_published(arguments)}", EXIT_INPUT
        )
    except KeyboardInterrupt:
        return fail("interrupted; nothing half-written is left", 130)


def _nothing_published(arguments: argparse.Namespace) -> str:
    return "; nothing was published" if hasattr(arguments, "output") else ""


def build_parser(verbs: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or of some of its commands."""
    parser = argparse.ArgumentParser(
        prog="grpo-toolkit",
        usage="grpo-toolkit [-h] [--version] COMMAND ...",
        description="Make models that leave GRPO training ready for inference.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", help=argparse.SUPPRESS, prog="grpo-toolkit")
    for verb in verbs:
        import_module(f"grpo_toolkit.cli.{verb}").add_command(commands)
    parser.epilog = "\n".join(
        [
            *(line for group, names in GROUPS.items() for line in (f"{group}:", *_lines(names, commands), "")),
            "examples:",
            "  grpo-toolkit doctor out/checkpoint-500 --base Qwen/Qwen2.5-VL-3B-Instruct",
            "  grpo-toolkit export out/checkpoint-500 exported",
            "  grpo-toolkit bench base=BASE export=exported --output timings",
            "",
            "grpo-toolkit COMMAND --help says more of each",
        ]
    )
    return parser


def _lines(names: Sequence[str], commands: Commands) -> list[str]:
    known = [name for name in names if name in commands.choices]
    return [f"  {name:<11}{(commands.choices[name].description or '').rstrip('.')}" for name in known]
