"""The steps of a process in the file system: counted, killed before any one of them, or made to fail there.

A step is a call that changes the file system: of `os`, of the C library's renameat2, or `open` for writing. Children
are forked with everything imported, so one that dies costs what its work costs.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHANGING = (
    "pwrite", "copy_file_range", "sendfile", "ftruncate", "mkdir", "rename", "replace", "unlink", "remove", "rmdir",
    "fsync", "fchmod", "chmod", "link", "symlink", "utime",
)  # fmt: skip
CHANGED: list[str] = []
"""The names of the steps that were made, in order, since `before_step` was called."""


def before_step(step: int, act: Callable[[], None]) -> Callable[[], int]:
    """Patch this process so that `act` is called before its `step`-th step (0: never); return the counter."""
    CHANGED.clear()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if name != "open" or _is_writing(*arguments, **options):
                CHANGED.append(name)
                if len(CHANGED) == step:
                    act()
            return call(*arguments, **options)

        return counting

    for name in CHANGING:
        if hasattr(os, name):
            setattr(os, name, counted(name, getattr(os, name)))
    os.open = _counted_open(os.open, counted)  # type: ignore[assignment]
    io.open = builtins.open = counted("open", io.open)  # type: ignore[assignment]
    ctypes.CDLL = _counted_library(ctypes.CDLL, counted)  # type: ignore[misc]
    return lambda: len(CHANGED)


def _counted_open(call: Callable[..., int], counted: Callable[..., Any]) -> Callable[..., int]:
    creating = counted("create", call)

    def opening(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        return (creating if flags & os.O_CREAT else call)(path, flags, *arguments, **options)

    return opening


def _is_writing(_file: Any, mode: str = "r", *_: Any, **options: Any) -> bool:
    return bool(set(options.get("mode", mode)) & set("wax+"))


def _counted_library(library: Any, counted: Callable[..., Any]) -> Any:
    def load(*arguments: Any, **options: Any) -> Any:
        found = library(*arguments, **options)

        class Library:
            renameat2 = staticmethod(counted("renameat2", found.renameat2))

        return Library

    return load


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def run_child(work: Callable[[], int]) -> int:
    """Return what a forked child's `work` returned, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_steps(work: Callable[[], object]) -> list[str]:
    """Count the steps that a child makes when nothing happens to it."""
    reading, writing = os.pipe()

    def counting() -> int:
        before_step(0, die)
        work()
        os.write(writing, ",".join(CHANGED).encode())
        return 0

    code = run_child(counting)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        made = pipe.read()
    assert code == 0
    return made.split(",")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
