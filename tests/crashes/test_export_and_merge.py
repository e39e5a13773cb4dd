"""Merges and exports that die or fail at any of their steps: what lies there is the old folder or the new one, whole,
and a second run converges. The steps are the calls that change the file system (steps.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint import publish as publish_module
from grpo_toolkit.cli import main
from grpo_toolkit.export.export import export_model
from grpo_toolkit.merge.merge import merge_adapter
from tests.support.publications import WEIGHTS, Publication, plain, train
from tests.support.steps import before_step, content, count_steps, die, failing, run_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

ALL = ["merge", "export", "export_of_an_adapter"]


@pytest.mark.parametrize(
    ("publication", "can_exchange"),
    [("merge", True), ("merge", False), ("export", True), ("export", False), ("export_of_an_adapter", True)],
    indirect=["publication"],
)
def test_killed_at_any_step_it_leaves_the_old_or_the_new(
    publication: Publication, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(publish_module, "exchange", lambda one, other: False)
    output = tmp_path / "out" / "published"
    publication.publish(publication.old, output)
    before = plain(output)
    publication.publish(publication.new, tmp_path / "expected")
    after = plain(tmp_path / "expected")
    shutil.copytree(output, tmp_path / "kept")

    def publish() -> int:
        return publication.publish(publication.new, output, "--overwrite")

    steps = len(count_steps(publish))
    assert 30 < steps < 250
    assert plain(output) == after
    seen = []
    for step in range(1, steps + 1):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", output)

        def publish_and_die(step: int = step) -> int:
            before_step(step, die)
            return publish()

        code = run_child(publish_and_die)
        if code == 0:  # workers may need a call less where a copy was whole at once
            continue
        assert code == -signal.SIGKILL
        if output.exists():
            found = plain(output)
            assert found in (before, after), f"step {step}"
            seen.append("new" if found == after else "old")
        else:
            assert not can_exchange, f"step {step}: neither the old nor the new is there"
            seen.append("none")
        if step % 10 == 0 or seen[-1] == "none":
            assert publish() == 0
            assert plain(output) == after
            assert [path.name for path in output.parent.iterdir()] == ["published"], f"step {step}"
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen.count("none") == (0 if can_exchange else 1)


def test_what_a_dead_owner_moved_away_is_put_back(publications: dict[str, Publication], tmp_path: Path) -> None:
    import platform

    from grpo_toolkit.checkpoint.publish import staged

    merge_adapter(publications["merge"].old, tmp_path / "merged")
    before = content(tmp_path / "merged")
    dead = run_child(lambda: 0) or 2**22 - 1  # a process number that is nobody's
    (tmp_path / "merged").rename(tmp_path / f".merged.previous-{platform.node()}-x-{dead}")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "merged", overwrite=True):
        raise KeyboardInterrupt
    assert content(tmp_path / "merged") == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# A merge is quick and meets every error; the exports, of minutes, share them.
@pytest.mark.parametrize(
    ("publication", "code"),
    [
        ("export", errno.ENOSPC),
        pytest.param("export", errno.EACCES, marks=pytest.mark.slow),
        pytest.param("export_of_an_adapter", errno.EIO, marks=pytest.mark.slow),
        pytest.param("export_of_an_adapter", errno.EROFS, marks=pytest.mark.slow),
        *(("merge", code) for code in (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)),
    ],
    ids=lambda value: errno.errorcode.get(value, value),
    indirect=["publication"],
)
def test_a_step_that_fails_leaves_the_old_or_the_new(publication: Publication, code: int, tmp_path: Path) -> None:
    """Whatever call fails, the answer is one line and exit code 2, or the failure did not matter."""
    output, log = tmp_path / "out" / "published", tmp_path / "log"
    publication.publish(publication.old, output)
    before = plain(output)
    publication.publish(publication.new, tmp_path / "expected")
    after = plain(tmp_path / "expected")
    shutil.copytree(output, tmp_path / "kept")
    steps = count_steps(lambda: publication.publish(publication.new, output, "--overwrite"))
    outcomes = set()
    for step, call in enumerate(steps, start=1):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", output)

        def publish_and_fail(step: int = step) -> int:
            with log.open("w") as file:
                os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            before_step(step, failing(code))
            done = publication.publish(publication.new, output, "--overwrite")
            sys.stderr.flush()
            return done

        done, where, found = run_child(publish_and_fail), f"step {step} ({call})", plain(output)
        assert done in (0, 2), f"{where}: {log.read_text()}"
        outcomes.add(done)
        said = [line for line in log.read_text().splitlines() if line.startswith("grpo-toolkit:")]
        assert "Traceback" not in log.read_text(), where
        if done == 0:
            assert found == after, where
        else:
            assert found in (before, after), where
            assert len(said) == 1, where
            assert os.strerror(code) in said[0], where
        left = {path.name for path in output.parent.iterdir()} - {"published"}
        assert call in ("unlink", "rmdir") or not left, f"{where}: {left}"  # removing failed, so it lies there
    assert outcomes == {0, 2}
    assert publication.publish(publication.new, output, "--overwrite") == 0
    assert [path.name for path in output.parent.iterdir()] == ["published"]


@pytest.mark.parametrize("publication", ALL, indirect=True)
def test_short_writes_are_gone_on_with(
    publication: Publication, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication.publish(publication.new, tmp_path / "expected")
    count = 0

    def short(call: Callable[..., int]) -> Callable[..., int]:
        def writing(*arguments: Any) -> int:
            nonlocal count
            count += 1
            if call is real["pwrite"]:
                descriptor, data, offset = arguments
                return call(descriptor, data[: max(1, len(data) // 3)], offset)
            source, target, size, *offsets = arguments
            return call(source, target, max(1, size // 3), *offsets)

        return writing

    real = {name: getattr(os, name) for name in ("pwrite", "copy_file_range")}
    for name, call in real.items():
        monkeypatch.setattr(os, name, short(call))
    assert publication.publish(publication.new, tmp_path / "published") == 0
    assert count > 10
    assert plain(tmp_path / "published") == plain(tmp_path / "expected")


FILLED = """
mount -t tmpfs -o size={size}k none {target} || exit 77
{python} - {arguments} <<'END'
import os, shutil, sys
from grpo_toolkit.cli import main
real = shutil.disk_usage
if {fooled}:  # as if something else filled it up after we had looked
    shutil.disk_usage = lambda path: real(path)._replace(free=2**50)
code = main(sys.argv[1:])
print(os.listdir({target!r}))
sys.exit(code)
END
"""


@pytest.mark.parametrize("publication", ALL, indirect=True)
@pytest.mark.parametrize("fooled", [False, True])
def test_a_small_file_system_that_fills_up(publication: Publication, fooled: bool, tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    arguments = [*publication.command, str(publication.new), str(target / "published"), *publication.options]
    script = FILLED.format(
        size=200, target=str(target), python=sys.executable, fooled=fooled, arguments=" ".join(arguments)
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 77):
        pytest.skip(f"no file system of one's own can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("grpo-toolkit:")]
    assert len(said) == 1
    assert ("No space left on device" if fooled else "GB are needed and 0.0 GB are free") in said[0]
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("publication", ALL, indirect=True)
def test_two_at_once(publication: Publication, overwrite: bool, tmp_path: Path) -> None:
    """Both publish, or one is told that the other was first; never a mixture, and nothing is left over."""
    output = tmp_path / "out" / "published"
    expected = []
    for name, source in (("a", publication.old), ("b", publication.new)):
        publication.publish(source, tmp_path / name)
        expected.append(plain(tmp_path / name))
    for _ in range(4):
        children = []
        for source in (publication.old, publication.new):
            child = os.fork()
            if child == 0:
                os._exit(publication.publish(source, output, *(["--overwrite"] if overwrite else [])))
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes in ([[0, 0]] if overwrite else [[0, 2]])
        assert plain(output) in expected
        assert [path.name for path in output.parent.iterdir()] == ["published"]
        shutil.rmtree(output)


def test_a_checkpoint_that_rotation_removes_meanwhile(qwen: Path, tmp_path: Path) -> None:
    """At whatever step: the whole export, or one line and nothing."""
    run, output = tmp_path / "run", tmp_path / "run" / "export"
    train(qwen, tmp_path / "kept", 0.01)

    def publish() -> int:
        source = run / "checkpoint-2"
        return main(["export", str(source), str(output), "--base", str(qwen), "--no-verify", "--quiet"])

    shutil.copytree(tmp_path / "kept", run / "checkpoint-2")
    assert publish() == 0
    expected = plain(output)
    assert "README.md" in expected
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "kept", run / "checkpoint-2")
    outcomes = []
    for step in range(1, len(count_steps(publish)) + 1):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run / "checkpoint-2")

        def publish_and_lose(step: int = step) -> int:
            before_step(step, lambda: os.system(f"rm -r {run / 'checkpoint-2'}") and None)
            return publish()

        outcomes.append(run_child(publish_and_lose))
        assert outcomes[-1] in (0, 2)
        assert [path.name for path in run.iterdir()] == (["export"] if outcomes[-1] == 0 else [])
        if outcomes[-1] == 0:
            assert plain(output) == expected
    assert 0 in outcomes
    assert 2 in outcomes


def test_rotation_takes_neither_an_export_nor_its_staging_for_a_checkpoint(qwen: Path, tmp_path: Path) -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    if not hasattr(trainer_utils, "rotate_checkpoints"):
        pytest.skip("a method of the trainer in this version")
    for step in (1, 2, 3):
        train(qwen, tmp_path / f"checkpoint-{step}", step / 100)
    export_model(tmp_path / "checkpoint-3", tmp_path / "export", base=qwen, verify=False)
    before = content(tmp_path / "export")
    with publish_module.staged(tmp_path / "checkpoint-3-merged", overwrite=False) as staging:
        (staging / "grpo_toolkit.json").write_text("{}")
        trainer_utils.rotate_checkpoints(output_dir=str(tmp_path), save_total_limit=1)
        assert staging.is_dir()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-3", "checkpoint-3-merged", "export"]
    assert content(tmp_path / "export") == before


@pytest.mark.parametrize("way", ["first", "exchanged", "moved_away"])
@pytest.mark.parametrize("publication", ALL, indirect=True)
def test_everything_is_on_disk_before_it_has_its_name_and_the_name_after_it(
    publication: Publication, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is flushed and then nothing in it changes; the rename comes next; its folder is last."""
    seen: list[tuple[str, int]] = []

    def spied(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(where: Any, *arguments: Any, **options: Any) -> Any:
            status = os.fstat(where) if isinstance(where, int) else os.stat(where)  # noqa: PTH116
            seen.append((name, status.st_ino))
            return call(where, *arguments, **options)

        return calling

    output = tmp_path / "published"
    if way != "first":
        publication.publish(publication.old, output)
    for name in ("fsync", "rename", "pwrite", "copy_file_range"):
        monkeypatch.setattr(os, name, spied(name, getattr(os, name)))
    one_step = spied("rename", publish_module.exchange) if way == "exchanged" else lambda one, other: False
    monkeypatch.setattr(publish_module, "exchange", one_step)
    assert publication.publish(publication.new, output, "--overwrite") == 0
    inodes = {path.stat().st_ino for path in (output, *output.rglob("*"))}
    named = seen.index(("rename", output.stat().st_ino))
    writes = [index for index, (name, _) in enumerate(seen) if name in ("pwrite", "copy_file_range")]
    flushed = [inode for index, (name, inode) in enumerate(seen) if name == "fsync" and writes[-1] < index < named]
    assert inodes <= set(flushed)
    assert flushed[-1] == output.stat().st_ino  # the folder, when all that is in it has been
    assert seen[named + 1 :] == [("fsync", tmp_path.stat().st_ino)]


def test_values_that_are_not_finite_are_not_copied_unseen(qwen: Path, tmp_path: Path) -> None:
    trained = train(qwen, tmp_path / "trained", 0.01)
    weights = load_file(trained / WEIGHTS)
    weights["model.norm.weight"][2] = torch.nan
    save_file(weights, trained / WEIGHTS, metadata={"format": "pt"})
    assert main(["export", str(trained), str(tmp_path / "export"), "--base", str(qwen)]) != 0
    assert not (tmp_path / "export").exists()
