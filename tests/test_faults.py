"""A merge that dies at any of its steps: what lies there is the old folder or the new one, and a second run converges.

The steps are the calls that change the file system. A child that is forked with everything imported counts them; then
one child after the other kills itself (SIGKILL) before its first, second, third, ... of them.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.merge.merge import merge_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

CHANGING = (
    "pwrite", "copy_file_range", "ftruncate", "mkdir", "rename", "unlink", "rmdir", "fsync", "fchmod", "chmod", "link"
)  # fmt: skip


def die_at(step: int) -> Callable[[], int]:
    """Kill this process before its `step`-th change of the file system; returns a count of those made (0: never)."""
    made = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counting

    for name in CHANGING:
        if hasattr(os, name):
            setattr(os, name, counted(getattr(os, name)))
    io.open = counted(io.open)  # type: ignore[assignment]
    ctypes.CDLL = _counted_library(ctypes.CDLL, counted)  # type: ignore[misc]
    return lambda: made


def _counted_library(library: Any, counted: Callable[..., Any]) -> Any:
    def load(*arguments: Any, **options: Any) -> Any:
        class Library:
            renameat2 = staticmethod(counted(library(*arguments, **options).renameat2))

        return Library

    return load


def run_child(work: Callable[[], int]) -> int:
    """What a forked child's `work` returned, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def adapters(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from test_merge import make_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(qwen, folder / "old", target_modules=["q_proj"]),
        make_adapter(qwen, folder / "new", target_modules=["v_proj"]),
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_merge_killed_at_any_step_leaves_the_old_or_the_new(
    can_exchange: bool, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        from grpo_toolkit import checkpoint

        monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    old, new = adapters
    output = tmp_path / "out" / "merged"
    merge_adapter(old, output)
    before = content(output)
    merge_adapter(new, tmp_path / "expected")
    after = content(tmp_path / "expected")
    shutil.copytree(output, tmp_path / "kept")

    def merge_and_count() -> int:
        made = die_at(0)
        merge_adapter(new, output, overwrite=True)
        return made()

    steps = run_child(merge_and_count)
    assert 30 < steps < 250
    assert content(output) == after
    seen = []
    for step in range(1, steps + 1):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", output)

        def merge_and_die(step: int = step) -> int:
            die_at(step)
            merge_adapter(new, output, overwrite=True)
            return 0

        code = run_child(merge_and_die)
        if code == 0:  # workers may need a call less where a copy was whole at once
            continue
        assert code == -signal.SIGKILL
        if output.exists():
            found = content(output)
            assert found in (before, after), f"step {step}"
            seen.append("new" if found == after else "old")
        else:
            assert not can_exchange, f"step {step}: neither the old nor the new is there"
            seen.append("none")
        if step % 10 == 0 or seen[-1] == "none":
            merge_adapter(new, output, overwrite=True)
            assert content(output) == after
            assert [path.name for path in output.parent.iterdir()] == ["merged"], f"step {step}"
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen.count("none") == (0 if can_exchange else 1)


def test_what_a_dead_owner_moved_away_is_put_back(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    import platform

    from grpo_toolkit.checkpoint import staged

    merge_adapter(adapters[0], tmp_path / "merged")
    before = content(tmp_path / "merged")
    dead = run_child(lambda: 0) or 2**22 - 1  # a process number that is nobody's
    (tmp_path / "merged").rename(tmp_path / f".merged.previous-{platform.node()}-x-{dead}")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "merged", overwrite=True):
        raise KeyboardInterrupt
    assert content(tmp_path / "merged") == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "ftruncate", "fsync", "mkdir"])
def test_a_call_that_fails_leaves_the_old_and_nothing_else(
    call: str,
    code: int,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "merged"
    merge_adapter(adapters[0], output)
    before = content(output)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        assert main(["merge", str(adapters[1]), str(output), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert os.strerror(code) in error
    assert error.count("\n") == 1
    assert content(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
