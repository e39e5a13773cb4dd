"""The doctor against the committed truth: what real readers do with good folders that a machine has mutated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.benchmarks.oracle import bases, truth
from scripts.benchmarks.oracle.cases import changed, chosen
from scripts.benchmarks.oracle.folders import digest
from scripts.benchmarks.oracle.mutations.operators import OPERATORS, held_out_families, held_out_operators
from scripts.benchmarks.oracle.readers import ReaderProcess
from scripts.benchmarks.oracle.score import results, score

if TYPE_CHECKING:
    from pathlib import Path

RECOMPUTED = 50


def test_what_is_held_out_stays_held_out() -> None:
    """The hash of a name decides; another operator would move the quarter, and mix what was seen with what was not."""
    assert len(OPERATORS) // 4 == len(held_out_operators()) == 12
    assert held_out_families(bases.FAMILIES) == {"gpt2", "qwen2_5_vl", "qwen3"}


def test_recipes_give_the_folders_that_the_readers_were_asked_about() -> None:
    told = {digest_ for _, digest_, _ in truth.load()}
    known = {digest(made) for case in chosen(bases.names(), seed=truth.SEED) if (made := changed(case)) is not None}
    assert told <= known
