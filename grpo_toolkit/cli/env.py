"""`grpo-toolkit env`: versions and hardware."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from grpo_toolkit.cli.shell import add_json, add_verb, version

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `env` and its flags."""
    parser = add_verb(
        commands,
        "env",
        help="versions and hardware, for a bug report",
        examples=("", "--json", "> environment.txt"),
    )
    parser.set_defaults(run=env)
    add_json(parser)


def env(arguments: argparse.Namespace) -> int:
    """Print versions and hardware, and return the exit code."""
    import platform
    from contextlib import suppress
    from importlib import metadata
    from importlib.util import find_spec

    facts = {
        "grpo_toolkit": version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    from grpo_toolkit.model.hardware.toolkit_commit import toolkit_commit

    commit = toolkit_commit()
    facts |= {} if commit is None else {"grpo_toolkit_commit": commit}
    for name in ("trl", "peft", "accelerate", "wandb"):
        with suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if absent:
        facts |= {name: f"not installed: pip install {name}" for name in absent}
    else:
        import torch

        from grpo_toolkit.model.hardware.environment import environment_of

        facts |= environment_of("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name}: {value}")
    return 0
