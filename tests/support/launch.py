"""Trainings on two processes for tests: scripts/benchmarks/two_processes.py with the scenarios of ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import two_processes
from scripts.benchmarks.two_processes import ALONE, KINDS, stored_weights
from tests.support.warm import python

__all__ = ["ALONE", "KINDS", "launch", "stored_weights"]
RANKS = Path(__file__).with_name("ranks.py")


def launch(kind: str, scenario: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Run a scenario of ranks.py and return each rank's report; skip the test where there is no DeepSpeed for it."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the newest stack alone installs DeepSpeed")
    return two_processes.launch(kind, scenario, folder, program=RANKS, python=python(), **options)
