"""A folder from a stranger must not hurt: mutated folders in, a diagnosis or one clear error out.

Hypothesis draws the mutations, which know the structure of JSON files and safetensors headers, and each draw is done
to each of ten reference folders. They are examined in memory, by the same readers and rules; a smaller number goes
through real files, with links, pipes and holes. The draws are the same in every run (derandomised); what once failed
stands in `@example` lines. GRPO_TOOLKIT_FUZZ_FOLDERS changes the number: 100,000 take two minutes of a core.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, example, given, settings

from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import ALL_RULES, diagnose_files
from grpo_toolkit.doctor.planned_files import PlannedFiles
from grpo_toolkit.doctor.repair_plan import make_plan
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines
from tests.support.memory_files import MemoryFiles, copied, load_seed
from tests.support.mutations import SEEDS, Mutation, mutate, mutations

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from grpo_toolkit.doctor.findings import Diagnosis

FOLDERS = int(os.environ.get("GRPO_TOOLKIT_FUZZ_FOLDERS", "10000"))
SEED_FILES = [load_seed(name) for name in SEEDS]
CODES = {rule.code for rule in ALL_RULES}

fuzzing = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def mutated(steps: list[Mutation]) -> list[MemoryFiles]:
    result = []
    for seed in SEED_FILES:
        files = copied(seed)
        for step in steps:
            mutate(files, step)
        result.append(files)
    return result


def examined(files: MemoryFiles) -> Diagnosis | CheckpointError:
    try:
        return diagnose_files(files)
    except CheckpointError as error:
        return error


def test_mutated_folders_are_examined_or_refused() -> None:
    counted: Counter[str] = Counter()

    @settings(fuzzing, max_examples=max(1, FOLDERS // len(SEEDS)))
    @example([("replace", 0, 0, 13), ("rename-key", 1, 2, 4)])
    @example([("replace", 2, 202, 31196)])  # a shape that is a string
    @given(mutations)
    def examine(steps: list[Mutation]) -> None:
        for files in mutated(steps):
            said = examined(files)
            if isinstance(said, CheckpointError):
                counted["refused"] += 1
                assert "\n" not in str(said)
                continue
            counted["examined"] += 1
            counted["with findings"] += bool(said.findings)
            assert {finding.code for finding in said.findings} <= CODES
            json.dumps(said.to_json(), allow_nan=False).encode()
            for line in diagnosis_lines(said):
                assert line.isprintable(), ascii(line)

    examine()
    assert counted["examined"] + counted["refused"] >= 0.95 * FOLDERS  # hypothesis may run out of new draws
    assert counted["examined"] > 0.8 * FOLDERS
    assert counted["with findings"] > 0.5 * FOLDERS


@settings(fuzzing, max_examples=max(1, FOLDERS // 500))
@example([("replace", 200, 1, 13)])  # half a surrogate pair in a file that is written anew
@given(mutations)
def test_repairs_of_mutated_folders_are_planned_and_final(steps: list[Mutation]) -> None:
    for files in mutated(steps):
        try:
            plan = make_plan(files)
        except CheckpointError:
            continue
        changed = {change.file: change.after for change in plan.changes}
        assert make_plan(PlannedFiles(under=files, changed=changed)).is_empty
        assert isinstance(plan.diff, str)


def write(files: MemoryFiles, folder: Path) -> None:
    """Put a folder in memory on the disk: sparse where it claims to be long, links and pipes where it is strange."""
    folder.mkdir()
    for name, raw in files.contents.items():
        path = folder / name
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(max(len(raw), min(files.sizes.get(name, 0), 2**40)) if name in files.sizes else len(raw))
    for name, entry in files.strange.items():
        path = folder / name.encode("ascii", "replace").decode()
        if path.is_file():
            path.unlink()
        if entry.is_folder:
            path.mkdir(exist_ok=True)
        elif entry.leaves:
            path.symlink_to("/etc/hostname" if entry.is_regular else "../../outside")
        else:
            os.mkfifo(path)


@settings(fuzzing, max_examples=max(1, FOLDERS // 1000))
@given(mutations)
def test_mutated_folders_on_disk(tmp_path_factory: pytest.TempPathFactory, steps: list[Mutation]) -> None:
    for files in mutated(steps):
        folder = tmp_path_factory.mktemp("fuzz") / "folder"
        write(files, folder)
        assert main(["doctor", str(folder)]) in (0, 1, 2)
        assert main(["repair", str(folder), "--dry-run", "--json"]) in (0, 1, 2)
        shutil.rmtree(folder.parent)
