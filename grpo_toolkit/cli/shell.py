"""The manners of every command: exit codes, errors in one line, quiet libraries."""

from __future__ import annotations

import os
import sys

from grpo_toolkit.errors import InputError

EXIT_FINDINGS = 1


EXIT_INPUT = 2

_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "wandb_workspaces": "wandb-workspaces"}
"""Names to install where they are others than those to import."""


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not here ({str(error).splitlines()[0]})") from error


def _quiet_libraries() -> None:
    """Keep the libraries' progress bars off the terminal; their warnings and errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _missing(error: ModuleNotFoundError) -> str:
    """Return one line that says which package a command needs, and how to install it.

    Raises:
        ModuleNotFoundError: it is one of ours that is not there.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "grpo_toolkit"):
        raise error
    name = _DISTRIBUTIONS.get(package, package)
    return f"this command needs {package}, which is not installed here: pip install {name}"


def _fail(error: object, code: int) -> int:
    print(f"grpo-toolkit: {error}", file=sys.stderr)
    return code
