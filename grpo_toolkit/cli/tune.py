"""`bench --tune`, `bench --gate` and `export --tuned`: what they print, and what they exit with."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.rows.row import ExplanationRow
    from grpo_toolkit.latency.tune.tuning import Trial, Tuning


def tune(arguments: argparse.Namespace) -> int:
    """Tune one folder and print what to do; 0, or an `InputError`."""
    from grpo_toolkit.cli.bench_arguments import named_model
    from grpo_toolkit.latency.tune.tune import tune_latency

    if len(arguments.models) != 1:
        raise InputError(f"--tune takes one model, not {len(arguments.models)}")
    _, place = named_model(arguments.models[0])
    if place.startswith(("http://", "https://")):
        raise InputError(f"--tune {place}: a server has settings of its own; name the folder that it serves")
    images = [None] if arguments.image_tokens is None else arguments.image_tokens
    tuning = tune_latency(
        place,
        new_tokens=arguments.new_tokens[0],
        prompt_tokens=arguments.prompt_tokens[0],
        image_tokens=images[0] or None,
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


def tuned_overrides(source: Path, base: str | None, *, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune a folder that is about to be exported.

    Returns:
        Keys for the export's `generation_config.json`, and what its manifest says about the tuning.

    Raises:
        InputError, CheckpointError: the base is not here.
    """
    from grpo_toolkit.checkpoint.base_lookup import base_of_adapter, named_base
    from grpo_toolkit.checkpoint.json_files import read_json
    from grpo_toolkit.checkpoint.model_folder import CONFIG
    from grpo_toolkit.latency.tune.tune import tune_latency
    from grpo_toolkit.latency.tune.tuning import keys_for_files

    named = None if base is None else named_base(base)
    folder = source
    if not (source / CONFIG).is_file():  # an adapter is exported merged, so as fast as its base
        folder = named or base_of_adapter(source)
    tuning = tune_latency(folder, device=device, progress=_say_trial)
    keys, left_out = keys_for_files(tuning, read_json((named or folder) / CONFIG))
    for line in left_out:
        print(line, file=sys.stderr)
    said: Tuning = tuning
    note = {
        "setting": said.best.name,
        "speedup": round(said.speedup, 3),
        "generation_config": keys,
        "left_out": left_out,
        "environment": dict(said.environment),
    }
    return keys, note


def report_missed(arguments: argparse.Namespace, base: str, missed: Sequence[Missed]) -> list[ExplanationRow]:
    """Explain what missed a gate, and print it unless JSON is wanted."""
    if not missed:
        return []
    from grpo_toolkit.latency.explain.missed_gate import explain_missed

    rows = explain_missed(base, missed, device=arguments.device)
    if not arguments.json:
        from grpo_toolkit.reporting.terminal.console import show
        from grpo_toolkit.reporting.terminal.explanation import explanation

        show(*map(str, missed), style="bold red")
        for row in rows:
            show("", explanation(row))
    return rows


def _say_trial(trial: Trial) -> None:
    result = trial.note or ("" if trial.tpot_s is None else f"{trial.tpot_s * 1e3:.2f} ms a token")
    print(f"{trial.name}: {result}", file=sys.stderr, flush=True)
