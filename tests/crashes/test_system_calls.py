"""Merges, exports, repairs and undos that are killed, or made to fail, at the system calls that they really make
(syscalls.py): what lies there is the old or the new, whole; a second run converges, and cleans up.

Where test_faults.py and test_repair_faults.py count calls from Python, these see the kernel's, those of the C library
and of other packages among them: the writes behind a flush, the openat and unlinkat of shutil, the writes of threads.
By default a run is stopped at the first and the last call of each name, around every rename, and at every few calls
between; with GRPO_TOOLKIT_FAULTS=all at every call.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.doctor.repair import undo_repair
from grpo_toolkit.doctor.undo import UNDO
from tests.crashes.test_repair import assert_old_or_new, visible
from tests.support.publications import Publication, plain
from tests.support.steps import content, run_child
from tests.support.syscalls import Call, calls, distinct, trace, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")

EVERY = os.environ.get("GRPO_TOOLKIT_FAULTS") == "all"
CODES = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS) if EVERY else (errno.ENOSPC, errno.EIO)
# The exchange of two folders, and what is done where the kernel has none.
WAYS = {"exchanged": (), "moved away": ("inject=renameat2:error=ENOSYS",)}
OF_WORKERS = ("pwrite64", "copy_file_range")  # how many of them a thread makes differs from run to run
RENAMES = ("rename", "renameat", "renameat2")
REMOVALS = ("unlink", "unlinkat", "rmdir")


def chosen(found: Sequence[Call], stride: int) -> list[Call]:
    """The calls to stop at, in order."""
    if EVERY:
        return list(found)
    kept = set(range(0, len(found), stride))
    for name in {call.name for call in found}:
        places = [place for place, call in enumerate(found) if call.name == name]
        kept |= {places[0], places[-1]}
        if name in RENAMES:
            kept |= {place + near for place in places for near in (-1, 0, 1)}
    return [call for place, call in enumerate(found) if place in kept]


def heard(work: Callable[[], int], said: Path) -> Callable[[], int]:
    """`work` with its standard error in a file."""

    def hearing() -> int:
        with said.open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = work()
        sys.stderr.flush()
        return code

    return hearing


def was_hit(call: Call, log: Path, folder: Path) -> bool:
    """Return whether the call at which a run was stopped changes the folder, as the call of the clean run did."""
    return (call.name, call.nth) in [(one.name, one.nth) for one in calls(log, folder)]


class Stage:
    """An output folder with something published in it, what it becomes, and a way back to how it was."""

    def __init__(self, publication: Publication, tmp_path: Path) -> None:
        self.publication, self.kept = publication, tmp_path / "kept"
        self.parent, self.output, self.log = tmp_path / "out", tmp_path / "out" / "published", tmp_path / "log"
        assert publication.publish(publication.old, self.kept) == 0
        assert publication.publish(publication.new, tmp_path / "expected") == 0
        self.before, self.after = plain(self.kept), plain(tmp_path / "expected")
        assert self.before != self.after

    def reset(self) -> None:
        shutil.rmtree(self.parent, ignore_errors=True)
        shutil.copytree(self.kept, self.output)

    def publish(self) -> int:
        return self.publication.publish(self.publication.new, self.output, "--overwrite")

    def left_over(self) -> list[str]:
        return sorted({path.name for path in self.parent.iterdir()} - {"published"})

    def calls(self, work: Callable[[], int], *inject: str) -> list[Call]:
        """Return the system calls of a clean run."""
        self.reset()
        assert trace(work, self.log, *inject) == 0
        return calls(self.log, self.parent)


@pytest.mark.parametrize(
    ("publication", "way", "stride"),
    [("merge", "exchanged", 6), ("merge", "moved away", 12), ("export", "exchanged", 9), ("export", "moved away", 20)],
    indirect=["publication"],
)
def test_killed_at_any_call_it_leaves_the_old_or_the_new(
    publication: Publication, way: str, stride: int, tmp_path: Path
) -> None:
    stage = Stage(publication, tmp_path)
    found = distinct(stage.calls(stage.publish, *WAYS[way]))
    assert {"openat", "write", "copy_file_range", "fsync", "renameat2", "unlinkat", "rmdir"} <= {c.name for c in found}
    assert 60 < len(found) < 250
    seen = []
    for call in chosen(found, stride=stride):
        stage.reset()
        code = trace(stage.publish, stage.log, *WAYS[way], call.killed())
        if code == 0 and call.name in OF_WORKERS:
            continue
        assert code == -signal.SIGKILL, call
        assert was_hit(call, stage.log, stage.parent), call
        if stage.output.exists():
            state = {True: "new", False: "old"}[plain(stage.output) == stage.after]
            assert plain(stage.output) in (stage.before, stage.after), call
        else:
            assert way == "moved away", call
            state = "none"
        seen.append(state)
        for name in stage.left_over():
            assert re.fullmatch(r"\.published\.(staging|previous)-.*-\d+", name), call
        assert stage.publish() == 0, call
        assert plain(stage.output) == stage.after, call
        assert stage.left_over() == [], call
    # Old, then new, with one call at most between the two at which there is neither.
    assert "".join(f"{state} " for state in seen).strip() == " ".join(sorted(seen, key=["old", "none", "new"].index))
    assert seen.count("none") == (1 if way == "moved away" else 0)
    assert {"old", "new"} <= set(seen)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("publication", "way", "stride"),
    [("merge", "exchanged", 9), ("merge", "moved away", 99), ("export", "exchanged", 12)],
    indirect=["publication"],
)
def test_a_call_that_fails_leaves_the_old_or_the_new_and_says_which(
    publication: Publication, way: str, stride: int, code: int, tmp_path: Path
) -> None:
    stage, said = Stage(publication, tmp_path), tmp_path / "said"
    outcomes = set()
    publish = heard(stage.publish, said)
    for call in chosen(distinct(stage.calls(publish, *WAYS[way])), stride=stride):
        if call.name == "renameat2" and WAYS[way]:
            continue
        stage.reset()
        done = trace(publish, stage.log, *WAYS[way], call.failing(code))
        if call.name in OF_WORKERS and not was_hit(call, stage.log, stage.parent):
            continue
        assert was_hit(call, stage.log, stage.parent), call
        assert done in (0, 2), f"{call}: {said.read_text()}"
        lines = [line for line in said.read_text().splitlines() if line.startswith("grpo-toolkit:")]
        assert "Traceback" not in said.read_text(), call
        found = plain(stage.output)
        outcomes.add((call.name, done))
        if done == 0:
            assert found == stage.after, call
            assert call.name not in ("write", "ftruncate", "fsync", "copy_file_range", "pwrite64"), call
        else:
            assert found == stage.before, call  # "nothing was published" is what it says
            assert len(lines) == 1, call
            assert os.strerror(code) in lines[0], call
            assert str(stage.parent) in lines[0], call
        assert call.name in REMOVALS or not stage.left_over(), call
    assert {("fsync", 2), ("rename" if WAYS[way] else "renameat2", 2), ("mkdir", 2), ("unlinkat", 0)} <= outcomes


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("publication", ["merge", "export", "export_of_an_adapter"], indirect=True)
def test_the_kernel_is_told_to_flush_everything_then_to_rename_then_to_flush_the_folder(
    publication: Publication, way: str, tmp_path: Path
) -> None:
    stage = Stage(publication, tmp_path)
    made = stage.calls(stage.publish, *WAYS[way])
    staging = re.compile(re.escape(str(stage.parent)) + r"/\.published\.staging-[^/>\"]+")
    named = [place for place, call in enumerate(made) if call.name in RENAMES][-1]
    flushed = [place for place, call in enumerate(made) if call.name == "fsync"]
    paths = {place: re.search(r"<(.*?)>", made[place].arguments)[1] for place in flushed}  # type: ignore[index]
    entries = {str(path.relative_to(stage.output)) for path in stage.output.rglob("*")}
    names = [staging.sub("", paths[place]).lstrip("/") for place in flushed if place < named]
    assert sorted(names) == sorted([*entries, ""])  # each file and folder once, then the one that lists them
    assert names[-1] == ""
    changing = [place for place, call in enumerate(made[:named]) if call.name not in ("fsync", *RENAMES)]
    changing = [place for place in changing if "chmod" not in made[place].name]
    assert max(changing) < min(flushed)
    assert paths[flushed[-1]] == str(stage.parent)
    assert named < flushed[-1]
    assert made[flushed[-1] + 1].name in REMOVALS  # what was there before goes when the new name is on disk
    assert not any(call.name in REMOVALS for call in made[:named])


@pytest.mark.parametrize("publication", ["merge", "export"], indirect=True)
def test_files_that_are_cut_short_are_not_published(publication: Publication, tmp_path: Path) -> None:
    """The kernel writes as much as a limit lets it, and then no more: a byte short of each file, and half-way."""
    stage, said = Stage(publication, tmp_path), tmp_path / "said"
    sizes = {path.stat().st_size for path in stage.kept.rglob("*") if path.is_file()}
    stage.reset()
    limits = [limit for size in sizes for limit in (size // 2, size - 1) if limit > 2048]  # what is said has to fit
    assert len(limits) > 5
    for limit in limits:

        def limited(limit: int = limit) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return stage.publish()

        done = run_child(heard(limited, said))
        lines = [line for line in said.read_text().splitlines() if line.startswith("grpo-toolkit:")]
        assert done == 2, limit
        assert len(lines) == 1, limit
        assert os.strerror(errno.EFBIG) in lines[0], limit
        assert str(stage.parent) in lines[0], limit
        assert plain(stage.output) == stage.before, limit
        assert stage.left_over() == [], limit


class Patient:
    """A sick checkpoint, two of its files links as in the Hub's cache, and its repair."""

    def __init__(self, sick: Path, base: Path, tmp_path: Path) -> None:
        self.sick, self.base = tmp_path / "sick", base
        self.blobs = tmp_path / "models--tiny--sick" / "blobs"
        self.folder, self.log = tmp_path / "run" / "checkpoint-1", tmp_path / "log"
        shutil.copytree(sick, self.sick)
        self.blobs.mkdir(parents=True)
        for name in ("config.json", "processor_config.json"):
            shutil.move(self.sick / name, self.blobs / name)
            (self.sick / name).symlink_to(self.blobs / name)
        self.reset(self.sick)
        self.before = content(self.folder)
        assert self.repair() == 0
        self.after = visible(self.folder)
        assert self.after != self.before
        self.repaired = tmp_path / "repaired"
        shutil.copytree(self.folder, self.repaired, symlinks=True)
        self.blobs_before = content(self.blobs)

    def reset(self, to: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(to, self.folder, symlinks=True)

    def repair(self) -> int:
        return main(["repair", str(self.folder), "--base", str(self.base), "--rewrite-weights"])

    def undo(self) -> int:
        return main(["repair", str(self.folder), "--undo"])

    def calls(self, to: Path, work: Callable[[], int]) -> list[Call]:
        """Return the system calls of a clean run."""
        self.reset(to)
        assert trace(work, self.log) == 0
        return calls(self.log, self.folder)

    def assert_old_or_new(self, call: Call) -> None:
        assert_old_or_new(self.folder, self.before, self.after, str(call))
        assert content(self.blobs) == self.blobs_before, call

    def assert_repaired(self, call: Call) -> None:
        assert visible(self.folder) == self.after, call
        assert list((self.folder / UNDO).glob(".*")) == [], call  # nothing of the one that ended
        undo_repair(self.folder)
        self.assert_undone(call)

    def assert_times_kept(self, call: Call) -> None:
        # Between the first mkdir and this utimensat nothing knows the folder's times any more.
        if (call.name, call.nth) != ("utimensat", 1):
            assert self.folder.stat().st_mtime_ns == self.sick.stat().st_mtime_ns, call

    def assert_undone(self, call: Call) -> None:
        assert content(self.folder) == self.before, call
        assert not (self.folder / UNDO.parts[0]).exists(), call
        assert (self.folder / "config.json").is_symlink(), call


@pytest.fixture
def patient(sick: Path, base: Path, tmp_path: Path) -> Patient:
    return Patient(sick, base, tmp_path)


def test_a_repair_killed_at_any_call_is_finished_by_the_next(patient: Patient) -> None:
    found = distinct(patient.calls(patient.sick, patient.repair))
    assert {"openat", "write", "fsync", "rename", "link", "mkdir", "utimensat", "rmdir"} <= {c.name for c in found}
    for call in chosen(found, stride=3):
        patient.reset(patient.sick)
        assert trace(patient.repair, patient.log, call.killed()) == -signal.SIGKILL, call
        assert was_hit(call, patient.log, patient.folder), call
        patient.assert_old_or_new(call)
        assert patient.repair() == 0, call
        patient.assert_times_kept(call)
        patient.assert_repaired(call)


def test_a_repair_killed_at_any_call_can_be_undone(patient: Patient, capsys: pytest.CaptureFixture[str]) -> None:
    undone = 0
    for call in chosen(distinct(patient.calls(patient.sick, patient.repair)), stride=8):
        patient.reset(patient.sick)
        assert trace(patient.repair, patient.log, call.killed()) == -signal.SIGKILL, call
        capsys.readouterr()
        code = patient.undo()
        undone += code == 0
        assert code == 0 or "no repair to undo" in capsys.readouterr().err, call  # killed before it replaced anything
        patient.assert_times_kept(call)
        patient.assert_undone(call)
    assert undone > 5


def test_an_undo_killed_at_any_call_is_finished_by_the_next(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    for call in chosen(distinct(patient.calls(patient.repaired, patient.undo)), stride=1):
        patient.reset(patient.repaired)
        assert trace(patient.undo, patient.log, call.killed()) == -signal.SIGKILL, call
        assert was_hit(call, patient.log, patient.folder), call
        patient.assert_old_or_new(call)
        capsys.readouterr()
        code = patient.undo()
        assert code == 0 or "no repair to undo" in capsys.readouterr().err, call
        patient.assert_undone(call)


def test_the_kernel_is_told_to_flush_what_an_undo_puts_back_before_it_forgets_that_it_has_to(patient: Patient) -> None:
    made = patient.calls(patient.repaired, patient.undo)
    back = [place for place, call in enumerate(made) if call.name in RENAMES and "undo.json" not in call.arguments]
    flushed = [place for place, call in enumerate(made) if f"<{patient.folder}>" in call.arguments]
    flushed = [place for place in flushed if made[place].name == "fsync"]
    forgetting = [call.name in REMOVALS and re.search(r'[/"]undo\.json"', call.arguments) for call in made]
    assert sum(map(bool, forgetting)) == 1
    forgotten = next(place for place, is_it in enumerate(forgetting) if is_it)
    assert len(back) > 3
    for place in back:
        assert any(place < flush < forgotten for flush in flushed), made[place]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("command", ["repair", "undo"])
def test_a_call_that_fails_in_a_repair_or_its_undo(code: int, command: str, patient: Patient, tmp_path: Path) -> None:
    work, to = (patient.repair, patient.sick) if command == "repair" else (patient.undo, patient.repaired)
    said = tmp_path / "said"
    quietly = heard(work, said)
    outcomes = set()
    for call in chosen(distinct(patient.calls(to, quietly)), stride=4):
        patient.reset(to)
        done = trace(quietly, patient.log, call.failing(code))
        assert was_hit(call, patient.log, patient.folder), call
        assert done in (0, 2), f"{call}: {said.read_text()}"
        assert "Traceback" not in said.read_text(), call
        outcomes.add((call.name, done))
        patient.assert_old_or_new(call)
        if done == 2:
            lines = [line for line in said.read_text().splitlines() if line.startswith("grpo-toolkit:")]
            assert len(lines) == 1, call
            assert os.strerror(code) in lines[0], call
            assert "published" not in lines[0], call
            if "nothing was changed" in lines[0]:
                assert content(patient.folder) == content(to), call
        assert work() == 0 or (command == "undo" and not (patient.folder / UNDO).exists()), call
        if command == "repair":
            patient.assert_repaired(call)
        else:
            patient.assert_undone(call)
    assert {("fsync", 2), ("rename", 2)} <= outcomes
