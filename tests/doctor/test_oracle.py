"""The doctor against the committed truth: what real readers do with good folders that a machine has mutated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import transformers

from scripts.benchmarks.oracle import bases, truth
from scripts.benchmarks.oracle.cases import changed, chosen
from scripts.benchmarks.oracle.folders import digest
from scripts.benchmarks.oracle.mutations.operators import OPERATORS, held_out_families, held_out_operators
from scripts.benchmarks.oracle.readers import ReaderProcess
from scripts.benchmarks.oracle.score import results, score

if TYPE_CHECKING:
    from pathlib import Path

RECOMPUTED = 50
EVERY = 5
"""Every fifth of the truth's cases, which stand in the order of hashes: all of them take five minutes."""


def test_what_is_held_out_stays_held_out() -> None:
    """The hash of a name decides; another operator would move the quarter, and mix what was seen with what was not."""
    assert len(OPERATORS) // 4 == len(held_out_operators()) == 12
    assert held_out_families(bases.FAMILIES) == {"gpt2", "qwen2_5_vl", "qwen3"}


def test_the_cases_of_the_truth_are_those_that_hashes_choose() -> None:
    told = {recorded for case, recorded, _ in truth.load() if case.folder.startswith("llama/")}
    names = [name for name in bases.names() if name.startswith("llama/")]
    known = {digest(made) for case in chosen(names, seed=truth.SEED) if (made := changed(case)) is not None}
    assert told
    assert told <= known


def test_the_doctor_says_what_the_readers_do() -> None:
    found = results(every=EVERY)
    seen = score([one for one in found if not one.case.is_held_out])
    assert seen["recall_of_all"] >= 0.985, seen
    assert seen["false_alarms_of_all"] <= 0.01, seen
    others = score([one for one in found if one.case.is_held_out])
    assert others["recall_of_all"] >= 0.85, others
    assert others["false_alarms_of_all"] <= 0.04, others


def test_the_doctor_says_what_vllm_does() -> None:
    found = results(told=truth.SERVED)
    seen = score([one for one in found if not one.case.is_held_out])
    assert seen["recall_of_all"] >= 0.96, seen
    assert seen["false_alarms_of_all"] <= 0.05, seen
    others = score([one for one in found if one.case.is_held_out])
    assert others["recall_of_all"] >= 0.85, others


@pytest.mark.stack
def test_the_installed_reader_still_does_what_the_truth_says(tmp_path: Path) -> None:
    """A sample is asked again; cases stand in the order of hashes, so that any stretch of them is a fair one."""
    version = transformers.__version__
    told = [(case, readers[version]) for case, _, readers in truth.load() if version in readers]
    if not told:
        pytest.skip(f"the truth was not told by {version}")
    reader = ReaderProcess()
    asker = truth.Asker(reader, tmp_path)
    sample = sorted(told[:RECOMPUTED], key=lambda one: one[0].folder)
    differs = [str(case) for case, said in sample if asker.verdict(case, case.build()) != said]
    reader.close()
    assert not differs
