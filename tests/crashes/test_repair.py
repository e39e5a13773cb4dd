"""Repairs that die or fail at any of their steps: each file is the old one or the new one, a second run converges, and
the undo still gives back what was there first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.doctor.repair import repair_checkpoint, undo_repair
from grpo_toolkit.doctor.undo import UNDO
from grpo_toolkit.errors import InputError
from tests.support.steps import before_step, content, count_steps, die, failing, run_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def visible(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in content(folder).items() if not name.startswith(str(UNDO.parts[0]))}


def assert_old_or_new(folder: Path, before: dict[str, bytes], after: dict[str, bytes], where: str) -> None:
    found = visible(folder)
    for name in found.keys() | before.keys() | after.keys():
        assert found.get(name) in (before.get(name), after.get(name)), f"{where}: {name}"


@pytest.mark.parametrize("rewrite_weights", [True, False])
def test_killed_at_any_step(rewrite_weights: bool, sick: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"

    def repair() -> bool:
        return repair_checkpoint(folder, base=base, rewrite_weights=rewrite_weights).applied

    shutil.copytree(sick, folder)
    before = visible(folder)
    steps = count_steps(repair)
    after = visible(folder)
    assert len(steps) > 20
    assert after != before
    partly = 0
    for step, call in enumerate(steps, start=1):
        shutil.rmtree(folder)
        shutil.copytree(sick, folder)

        def repair_and_die(step: int = step) -> int:
            before_step(step, die)
            repair()
            return 0

        assert run_child(repair_and_die) == -signal.SIGKILL
        where = f"step {step} ({call})"
        assert_old_or_new(folder, before, after, where)
        partly += visible(folder) not in (before, after)
        repair()
        assert visible(folder) == after, where
        assert list((folder / UNDO).glob(".*")) == [], where  # nothing of the one that died
        undo_repair(folder)
        assert content(folder) == before, where
    assert partly > 0  # several files cannot change in one step: this is why the undo is written first


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_step_that_fails(
    code: int, sick: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-1"

    def repair() -> int:
        return main(["repair", str(folder), "--base", str(base), "--rewrite-weights"])

    shutil.copytree(sick, folder)
    before = visible(folder)
    steps = count_steps(repair)
    after = visible(folder)
    outcomes = set()
    for step, call in enumerate(steps, start=1):
        shutil.rmtree(folder)
        shutil.copytree(sick, folder)
        capfd.readouterr()

        def repair_and_fail(step: int = step) -> int:
            before_step(step, failing(code))
            return repair()

        done, where = run_child(repair_and_fail), f"step {step} ({call})"
        said = capfd.readouterr().err
        outcomes.add(done)
        assert done in (0, 2), f"{where}: {said}"
        assert_old_or_new(folder, before, after, where)
        if done == 2:
            assert said.count("\n") == 1, where
            assert os.strerror(code) in said, where
            if visible(folder) == before and not (folder / UNDO).exists():
                assert "nothing was changed" in said, where
        else:
            assert visible(folder) == after, where
        assert repair() == 0
        assert visible(folder) == after, where
        undo_repair(folder)
        assert visible(folder) == before, where
    assert outcomes == {0, 2}


def test_the_undo_is_on_disk_before_anything_is_replaced_and_the_new_files_before_they_have_names(
    sick: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(sick, folder)
    seen: list[tuple[str, str, int]] = []

    def spied(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def calling(where: Any, *arguments: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)  # noqa: PTH115
            seen.append((name, path, os.stat(path).st_ino))  # noqa: PTH116
            return call(where, *arguments, **options)

        return calling

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spied(name))
    assert repair_checkpoint(folder, base=base, rewrite_weights=True).applied
    flushed = [inode for name, _, inode in seen if name == "fsync"]
    replaced = [(path, inode) for name, path, inode in seen if name == "replace"]
    assert {inode for _, inode in replaced} <= set(flushed)
    lists = [index for index, (name, path, _) in enumerate(seen) if name == "replace" and "undo.json" in path]
    renames = [index for index, (name, path, _) in enumerate(seen) if name == "replace" and "undo.json" not in path]
    journal, done = lists
    undo = (folder / UNDO).stat().st_ino

    def flushes(begin: int, end: int) -> list[int]:
        return [inode for name, _, inode in seen[begin:end] if name == "fsync"]

    # The new files and what was kept, then the list of both, then the changes, then that there is no more to do.
    assert journal < renames[0] < renames[-1] < done
    assert any(path.rpartition("/")[2].startswith(".staging-") for _, path, _ in seen[:journal])
    assert undo in flushes(0, journal)
    assert undo in flushes(journal, renames[0])
    assert folder.stat().st_ino in flushes(renames[-1], done)
    assert undo in flushes(done, len(seen))
    undo_repair(folder)
    assert visible(folder) == visible(sick)


@pytest.mark.parametrize(
    "unfinished",
    [
        {"staging": "../..", "files": [], "times": [0, 0]},
        {"staging": ".staging-x", "files": ["../elsewhere"], "times": [0, 0]},
        {"staging": ".staging-x", "files": [], "times": ["now"]},
        ["config.json"],
    ],
)
def test_a_journal_that_somebody_wrote_is_refused(unfinished: Any, sick: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(sick, folder)
    repair_checkpoint(folder, base=base)
    manifest = folder / UNDO / "undo.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "unfinished": unfinished}))
    before = visible(folder)
    with pytest.raises(InputError, match=r"undo.json: damaged; nothing was changed"):
        repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert visible(folder) == before
