"""The system calls of a child: those that change a folder, listed by strace, and any one of them made to kill
it or to fail.

The child is forked with everything imported, so it costs what its work costs; it waits until strace is attached.
strace counts calls by thread and name (https://man7.org/linux/man-pages/man1/strace.1.html), and so does a `Call`:
where several threads make the same calls, the first that comes so far is hit.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHANGING: Final = (
    "openat", "open", "creat", "write", "writev", "pwrite64", "pwritev", "copy_file_range", "sendfile", "ftruncate",
    "fallocate", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
    "unlink", "unlinkat", "rmdir", "fsync", "fdatasync", "chmod", "fchmod", "fchmodat", "utimensat",
)  # fmt: skip
_OPENING: Final = ("openat", "open")
_LINE: Final = re.compile(r"\d+ +(\w+)\((.*)")
_PR_SET_PTRACER: Final = 0x59616D61
_ANY: Final = ctypes.c_ulong(-1)


@dataclass(frozen=True)
class Call:
    """A system call: its name, its number among those of that name in its thread, and what strace shows of it."""

    name: str
    nth: int
    arguments: str

    def killed(self) -> str:
        """The flag of strace that kills the process as it makes this call, which is then not made."""
        return f"inject={self.name}:signal=SIGKILL:when={self.nth}"

    def failing(self, code: int) -> str:
        """The flag of strace that lets this call fail, without being made."""
        return f"inject={self.name}:error={errno.errorcode[code]}:when={self.nth}"

    def __str__(self) -> str:
        return f"{self.name} {self.nth}: {self.arguments}"


def trace(work: Callable[[], int], log: Path, *inject: str) -> int:
    """Return what a forked child's `work` returned, or minus the signal that ended it; strace logs its calls."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 255
        try:
            ours.close()
            # Where only ancestors may trace (Yama): https://man7.org/linux/man-pages/man2/PR_SET_PTRACER.2const.html
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
            theirs.send(b"?")
            if theirs.recv(1):
                code = work()
        finally:
            os._exit(code)
    theirs.close()
    ours.recv(1)
    names = ",".join(f"?{name}" for name in CHANGING)  # some are not on every architecture
    flags = [part for one in (f"trace={names}", *inject) for part in ("-e", one)]
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), *flags, "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace, ours:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        is_attached = said.rstrip().endswith(" attached")
        if is_attached:
            ours.send(b"!")
        ours.shutdown(socket.SHUT_WR)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said += strace.stderr.read()
    if not is_attached:
        raise OSError(said.strip())
    return code


def calls(log: Path, folder: Path) -> list[Call]:
    """Return the calls of a log that change something in `folder`, in the order in which they were begun."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:  # the end of a call of which another thread's was begun meanwhile, of a thread, or a signal
            continue
        name, arguments = match.groups()
        thread = line.split(maxsplit=1)[0]
        counts[thread, name] += 1
        is_writing = name not in _OPENING or any(flag in arguments for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
        if is_writing and str(folder) in arguments:
            found.append(Call(name, counts[thread, name], arguments))
    return found


def distinct(found: Sequence[Call]) -> list[Call]:
    """Return each call that strace can tell from the others, once."""
    return list({(call.name, call.nth): call for call in reversed(found)}.values())[::-1]


@functools.cache
def why_not() -> str | None:
    """Return the reason why strace cannot be used here, or None where it can."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "strace is not installed"
    with tempfile.TemporaryDirectory() as folder:
        try:
            code = trace(lambda: 0, Path(folder, "log"), "inject=?fsync:signal=SIGKILL:when=1")
        except OSError as error:
            return f"strace may trace nothing here ({error})"
    return None if code == 0 else f"a traced process ended with {code}"
