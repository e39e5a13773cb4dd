"""`grpo-toolkit tune`, the older spelling `bench --tune`, and `export --tuned`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.bench_arguments import PACKED_VISION, count, named_model, two_or_more
from grpo_toolkit.cli.shell import add_device, add_json, add_verb, quiet_libraries
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.latency.tune.tuning import Trial


def add_command(commands: Commands) -> None:
    """Add `tune` and its flags."""
    parser = add_verb(
        commands,
        "tune",
        help="find the fastest setting that gives a model's own tokens",
        examples=(
            "EXPORT",
            "EXPORT --device cuda --max-tpot 20",
            "EXPORT --image-tokens 256 --max-memory 40",
        ),
    )
    parser.add_argument("model", metavar="FOLDER", help="a model or adapter folder")
    parser.add_argument(
        "--new-tokens", type=two_or_more, default=64, metavar="N", help="tokens of an answer (default 64)"
    )
    parser.add_argument(
        "--prompt-tokens", type=count, default=512, metavar="N", help="tokens of the prompt (default 512)"
    )
    parser.add_argument("--image-tokens", type=count, metavar="N", help="tokens of its image (default: no image)")
    parser.add_argument("--packed-vision", action="store_true", help=f"try every setting with {PACKED_VISION}")
    parser.add_argument(
        "--rounds",
        type=count,
        default=12,
        help="rounds in which the best setting and the default take turns (default 12)",
    )
    parser.add_argument(
        "--max-tpot", type=float, metavar="MS", help="try larger batches while a token takes no longer than this"
    )
    parser.add_argument(
        "--max-memory", type=float, metavar="GB", help="try larger batches while they need no more memory than this"
    )
    parser.set_defaults(run=tune)
    add_json(parser)
    add_device(parser)


def tune(arguments: argparse.Namespace) -> int:
    """Tune one folder, print what to do (or JSON), and return the exit code."""
    from grpo_toolkit.latency.tune.tune import tune_latency

    if arguments.model.startswith(("http://", "https://")):
        raise InputError(f"{arguments.model}: a server has settings of its own; name the folder that it serves")
    quiet_libraries()
    tuning = tune_latency(
        arguments.model,
        new_tokens=arguments.new_tokens,
        prompt_tokens=arguments.prompt_tokens,
        image_tokens=arguments.image_tokens,
        packed_vision=arguments.packed_vision,
        device=arguments.device,
        rounds=arguments.rounds,
        max_tpot_s=None if arguments.max_tpot is None else arguments.max_tpot / 1e3,
        max_memory_bytes=None if arguments.max_memory is None else round(arguments.max_memory * 1e9),
        progress=_say_trial,
    )
    if arguments.json:
        print(json.dumps(tuning.to_json()))
    else:
        from grpo_toolkit.reporting.terminal.console import show
        from grpo_toolkit.reporting.terminal.explanation import tuned

        show(tuned(tuning))
    return 0


def tune_of_bench(arguments: argparse.Namespace) -> int:
    """Tune by the flags of `bench --tune`, where some are lists of which the first counts."""
    if len(arguments.models) != 1:
        raise InputError(f"--tune takes one model, not {len(arguments.models)}")
    given = argparse.Namespace(**vars(arguments))
    given.model = named_model(arguments.models[0])[1]
    given.new_tokens, given.prompt_tokens = arguments.new_tokens[0], arguments.prompt_tokens[0]
    given.image_tokens = (arguments.image_tokens or [None])[0] or None
    return tune(given)


def tuned_overrides(source: Path, base: str | None, *, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune a folder that is about to be exported.

    Returns:
        Keys for the export's `generation_config.json`, and what its manifest says about the tuning.

    Raises:
        InputError, CheckpointError: the base is not here.
    """
    from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter, named_base
    from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
    from grpo_toolkit.checkpoint.json_files import read_json
    from grpo_toolkit.latency.tune.tune import tune_latency
    from grpo_toolkit.latency.tune.tuning import keys_for_files

    named = None if base is None else named_base(base)
    # An export is as fast as its base. Its source may not be: an adapter is not merged there, a cache may be off.
    folder = named or (source if (source / CONFIG).is_file() else base_of_adapter(source))
    tuning = tune_latency(folder, device=device, batches_s=0.0, progress=_say_trial)
    keys, left_out = keys_for_files(tuning, read_json((named or folder) / CONFIG))
    for line in left_out:
        print(line, file=sys.stderr)
    note = {
        "setting": tuning.best.name,
        "speedup": round(tuning.speedup, 3),
        "generation_config": keys,
        "left_out": left_out,
        "environment": dict(tuning.environment),
    }
    return keys, note


def _say_trial(trial: Trial) -> None:
    result = trial.note or ("" if trial.tpot_s is None else f"{trial.tpot_s * 1e3:.2f} ms a token")
    print(f"{trial.name}: {result}", file=sys.stderr, flush=True)
