"""`grpo-toolkit explain`: say why a trained model is slower than its base."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cli.bench_arguments import count, positive, two_or_more
from grpo_toolkit.cli.shell import add_device, add_json, add_verb, check_attention, check_writable
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.rows.row import LatencyRow

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "attn_implementation": (),
    "device_map": (),
    "cache_implementation": ("dynamic", "static"),
    "sdpa_backend": ("flash", "efficient", "math", "cudnn", "no_cudnn"),
    "use_cache": ("true", "false"),
    "compiled": ("true", "false"),
    "training": ("true", "false"),
}
"""The settings that `--with` takes, and their values where they are few."""


def add_command(commands: Commands) -> None:
    """Add `explain` and its flags."""
    parser = add_verb(
        commands,
        "explain",
        help="say why answers or training steps are slower than they need be",
        examples=(
            "BASE out/checkpoint-500",
            "BASE out/checkpoint-500 --with dtype=float32 --rounds 12",
            "--steps out",
        ),
    )
    parser.add_argument("base", type=Path, nargs="?", help="the base model's folder")
    parser.add_argument("trained", type=Path, nargs="?", help="the trained model's or adapter's folder")
    parser.add_argument(
        "--steps", type=Path, metavar="RUN_DIR", help="say instead where a training's steps spend their time, and why"
    )
    parser.add_argument(
        "--with",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how the trained model is run, such as dtype=float32 or sdpa_backend=math",
    )
    parser.add_argument("--prompt", help="what to ask (default: made up)")
    parser.add_argument("--image", type=Path, help="an image to ask about")
    parser.add_argument(
        "--max-new-tokens", type=two_or_more, default=128, help="most tokens of an answer (default 128)"
    )
    parser.add_argument("--rounds", type=count, default=6, help="measured rounds (default 6)")
    parser.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="stop after so many seconds, but not before 3 rounds"
    )
    parser.add_argument(
        "--thinking",
        metavar="TEXT",
        help="the instruction to think: the trained model is asked with it and without it; off leaves this out "
        "(default: the part of the prompt that names <think>)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the explanation to this latency.jsonl")
    parser.set_defaults(run=explain)
    add_json(parser)
    add_device(parser)


def explain(arguments: argparse.Namespace) -> int:
    """Explain, print, and return the exit code: 1 where a cause was found."""
    if arguments.steps is not None:
        return _explain_steps(arguments)
    if arguments.base is None or arguments.trained is None:
        arguments.parser.error("give a base and a trained model, or --steps and a training's output folder")
    from grpo_toolkit.checkpoint.folders.lineage import order_notice
    from grpo_toolkit.latency.bench.thinking import thinking_in
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.explain.explanation import explain_latency, top_cause, unexplained_share
    from grpo_toolkit.latency.rows.store import append_rows
    from grpo_toolkit.reporting.terminal.console import say, show, turn_progress
    from grpo_toolkit.reporting.terminal.two_questions import thinking_sentence

    notice = order_notice(arguments.base, arguments.trained)
    if notice is not None:
        say(f"NOTE: {notice}")
    if arguments.output is not None:
        check_writable(arguments.output.absolute().parent)
    usual = Options(device=arguments.device)
    trained_options = with_settings(usual, arguments.settings)
    check_attention([trained_options.attn_implementation])
    row = explain_latency(
        arguments.base,
        arguments.trained,
        requests=_requests(arguments),
        max_new_tokens=arguments.max_new_tokens,
        rounds=arguments.rounds,
        budget_s=arguments.budget,
        device=arguments.device,
        options=usual,
        trained_options=trained_options,
        progress=turn_progress(f"{arguments.base} and {arguments.trained}"),
    )
    if not arguments.json:
        from grpo_toolkit.reporting.terminal.explanation import explanation

        show(explanation(row))
    asked = _ask_both_ways(arguments, trained_options)
    cost = next(iter(thinking_in(asked)), None)
    if arguments.json:
        said = {"top_cause": top_cause(row), "unexplained_share": unexplained_share(row)}
        print(json.dumps({**row.to_json(), **said, "thinking": None if cost is None else asdict(cost)}))
    elif cost is not None:
        show("", thinking_sentence(cost))
    if arguments.output is not None:
        append_rows(arguments.output, [row, *asked])
    return 0 if top_cause(row) is None else 1


def _ask_both_ways(arguments: argparse.Namespace, options: Options) -> list[LatencyRow]:
    """Ask the trained model with and without the instruction to think; say it where there is none."""
    from grpo_toolkit.latency.bench.thinking import ask_both_ways
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.reporting.terminal.console import say, turn_progress

    if arguments.thinking == "off":
        return []
    rows = ask_both_ways(
        Arm(name="trained", path=arguments.trained, options=options),
        _requests(arguments),
        instruction=arguments.thinking,
        rounds=arguments.rounds,
        max_new_tokens=arguments.max_new_tokens,
        budget_s=arguments.budget,
        progress=turn_progress(f"{arguments.trained} once more, to ask it with and without the instruction to think"),
    )
    if not rows:
        say("thinking: the prompt names no <think>; --thinking TEXT says which instruction to leave out")
    return rows


def _explain_steps(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.reporting.report.step_section import explained
    from grpo_toolkit.step_time.store import load_step_review

    if arguments.base is not None:
        raise InputError("--steps is about a training's output folder, and takes no models")
    review = load_step_review(arguments.steps)
    row = explained(review)
    if row is None:
        raise InputError(f"{review.path}: no step in it has phases, so there is nothing to explain")
    if arguments.json:
        print(json.dumps({**row.to_json(), "top_cause": row.top_cause}))
    else:
        from grpo_toolkit.reporting.terminal.console import show
        from grpo_toolkit.reporting.terminal.step_time import step_time

        show(step_time(row))
    return 0 if row.top_cause is None else 1


def with_settings(options: Options, settings: list[str]) -> Options:
    """Return options with settings given as KEY=VALUE.

    Raises:
        InputError: a key or value that is not known.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in _CHOICES:
            raise InputError(f"--with {setting}: expected KEY=VALUE, KEY one of {', '.join(_CHOICES)}")
        choices = _CHOICES[key]
        if choices and value not in choices:
            raise InputError(f"--with {setting}: expected one of {', '.join(choices)}")
        found[key] = value == "true" if choices == ("true", "false") else value
    return replace(options, **found)


def _requests(arguments: argparse.Namespace) -> list[Any]:
    from grpo_toolkit.cli.bench_arguments import asked

    if arguments.prompt is None:
        if arguments.image is not None:
            raise InputError("--image: say what to ask about it with --prompt")
        return []
    return [asked(arguments)]
