"""`grpo-toolkit`: thin commands over the library.

Standard output is data, standard error is talk. Exit codes: 0 clean, 1 a check or gate was missed, 2 wrong use or
unreadable input. Only the standard library is imported at start, so that help and file-reading commands answer at
once; argparse rather than a prettier library for the same reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.bench_arguments import add_arguments as add_bench_arguments
from grpo_toolkit.cli.export import _export, _merge, _verify
from grpo_toolkit.cli.shell import EXIT_FINDINGS, EXIT_INPUT, _check_device, _fail, _missing, _quiet_libraries
from grpo_toolkit.errors import GrpoToolkitError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence


COMPAT_HELP = "who can read it: all (also transformers 4 and servers, whatever wrote the base), v5 (the base's forms)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.version:
        print(f"grpo-toolkit {_version()}")
        return 0
    if getattr(arguments, "run", None) is None:
        build_parser().print_help(sys.stderr)
        return EXIT_INPUT
    try:
        _check_device(getattr(arguments, "device", "cpu"))
        return int(arguments.run(arguments))
    except VerificationError as error:
        return _fail(error, EXIT_FINDINGS)
    except GrpoToolkitError as error:
        return _fail(error, EXIT_INPUT)
    except ModuleNotFoundError as error:  # the doctor needs nothing but this package, so it may stand alone
        return _fail(_missing(error), EXIT_INPUT)
    except OSError as error:  # a full disk, a folder that may not be written: what was staged is gone again
        where = " to ".join(str(name) for name in (error.filename, error.filename2) if name)
        return _fail(f"{where}{': ' if where else ''}{error.strerror or error}; nothing was published", EXIT_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written is left", 130)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="grpo-toolkit", description="Make models that leave GRPO training ready for inference."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    export = commands.add_parser("export", help="publish a trained folder for inference: merged, verified, portable")
    export.add_argument("source", type=Path, help="a full checkpoint or a LoRA adapter")
    export.add_argument("output", type=Path, help="the folder to publish")
    export.add_argument("--base", help="folder or Hub name of the base model whose files are carried")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--link", action="store_true", help="hard links to the source's weight files where they fit")
    export.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, such as 5GB")
    export.add_argument("--dtype", metavar="DTYPE", help="of every floating-point tensor, such as float16")
    export.add_argument("--compat", choices=("all", "v5"), default="all", help=COMPAT_HELP)
    export.add_argument("--push-to-hub", metavar="REPO", help="upload the verified folder (a new repo is private)")
    export.add_argument("--quiet", action="store_true", help="say nothing but the folder")
    export.add_argument("--tuned", action="store_true", help="find the fastest setting, and write what files can hold")
    export.add_argument("--no-verify", action="store_true", help="publish without reloading and checking")
    export.set_defaults(run=_export)

    merge = commands.add_parser("merge", help="merge a LoRA adapter into its base, streamed from file to file")
    merge.add_argument("adapter", type=Path, help="an adapter as PEFT saves it")
    merge.add_argument("output", type=Path, help="the folder to publish")
    merge.add_argument("--base", help="folder or Hub name of the base (default: the one that the adapter names)")
    merge.add_argument("--adapter-name", metavar="NAME", help="which one, of a folder that holds several")
    merge.add_argument(
        "--max-shard-size", metavar="SIZE", help="largest weight file, such as 5GB (default: the base's)"
    )
    merge.add_argument("--dtype", metavar="DTYPE", help="of every floating-point tensor (default: the base's)")
    merge.add_argument("--compat", choices=("all", "v5"), default="all", help=COMPAT_HELP)
    merge.add_argument("--allow-unchanged", action="store_true", help="publish even if some of it changes nothing")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge or export")
    merge.add_argument("--quiet", action="store_true", help="say nothing but the folder")
    merge.add_argument("--json", action="store_true", help="one JSON object on standard output")
    merge.set_defaults(run=_merge)

    verify = commands.add_parser("verify", help="reload an export in a fresh process and check it")
    verify.add_argument("export", type=Path, help="the exported folder")
    verify.add_argument("--manifest", action="store_true", help="only compare its files with the sums in its manifest")
    verify.add_argument("--base", help="folder or Hub name of the base: names, shapes, dtypes and ties are its own")
    verify.add_argument("--reference", type=Path, help="a model folder that must give the same greedy tokens")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time models side by side, taking turns")
    add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    explain = commands.add_parser("explain", help="say why a trained model is slower than its base")
    explain.add_argument("base", type=Path, help="the base model's folder")
    explain.add_argument("trained", type=Path, help="the trained model's or adapter's folder")
    explain.add_argument(
        "--with",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how the trained model is run, such as dtype=float32 or sdpa_backend=math",
    )
    explain.add_argument("--prompt", help="what to ask (default: made up)")
    explain.add_argument("--image", type=Path, help="an image to ask about")
    explain.add_argument("--max-new-tokens", type=int, default=128, help="cap of an answer (default 128)")
    explain.add_argument("--rounds", type=int, default=6, help="measured rounds (default 6)")
    explain.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long, but not before 3 rounds")
    explain.add_argument("--output", type=Path, metavar="FILE", help="append the explanation to this latency.jsonl")
    explain.set_defaults(run=_explain)

    doctor = commands.add_parser("doctor", help="say what is wrong with a model folder, or with a run's checkpoints")
    doctor.add_argument("path", type=Path, help="a model, an adapter, a checkpoint, or a run folder with many")
    doctor.add_argument("--base", help="folder or Hub name (in the local cache) of the model it was trained from")
    doctor.add_argument("--deep", action="store_true", help="also compare weights byte by byte")
    doctor.set_defaults(run=_doctor)

    repair = commands.add_parser("repair", help="mend what the doctor found, atomically and with an undo")
    repair.add_argument("path", type=Path, help="as for doctor")
    repair.add_argument("--base", help="as for doctor; many faults are mended with what the base says")
    repair.add_argument("--dry-run", action="store_true", help="print the changes as a diff and make none")
    repair.add_argument("--undo", action="store_true", help="put back, byte for byte, what repairs replaced")
    repair.add_argument("--rewrite-weights", action="store_true", help="also mend what needs new safetensors files")
    repair.set_defaults(run=_repair)

    report = commands.add_parser("report", help="make a run's report.html and pictures again, or log its rows again")
    report.add_argument("path", type=Path, nargs="?", help="an output folder with latency/latency.jsonl, or that file")
    report.add_argument("--compare", type=Path, nargs=2, metavar="RUN", help="two runs side by side, in one page")
    report.add_argument("--replay", choices=("wandb", "trackio"), help="log what the tracker does not have yet")
    report.add_argument("--card", action="store_true", help="also write the section into the export's README.md")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to write the page")
    report.set_defaults(run=_report)

    workspace = commands.add_parser("workspace", help="save a W&B workspace with the latency charts in their place")
    workspace.add_argument("--entity", required=True, help="user or team")
    workspace.add_argument("--project", required=True, help="the project of the runs")
    workspace.add_argument("--dry-run", action="store_true", help="print its JSON and save nothing; needs no account")
    workspace.set_defaults(run=_workspace)

    env = commands.add_parser("env", help="versions and hardware, for a bug report")
    env.set_defaults(run=_env)

    for command in (export, verify, bench, explain, doctor, repair, report, workspace, env):
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
        if command in (export, verify, bench, explain):
            command.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1", ... (default cpu)')
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.bench import bench

    _quiet_libraries()
    return bench(arguments)


def _explain(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.explain import explain

    return explain(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.doctor import doctor

    return doctor(arguments)


def _repair(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.doctor import repair

    return repair(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.report import report

    return report(arguments)


def _workspace(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.cli.report import workspace

    return workspace(arguments)


def _version() -> str:
    from importlib import metadata

    return metadata.version("grpo-toolkit")


def _env(arguments: argparse.Namespace) -> int:
    import platform
    from importlib.util import find_spec

    facts = {
        "grpo_toolkit": _version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        facts |= dict.fromkeys(missing, "not installed")
    else:
        import torch

        from grpo_toolkit.latency.hardware.environment import environment_of

        facts |= environment_of("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
