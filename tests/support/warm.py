"""Processes of their own that need not import everything first.

An import of torch, transformers and TRL costs six seconds of a processor, more than most of what tests ask of a
process. So the first one of a test run starts a server (this file as a program) that imports what they share,
third-party packages alone, and is forked for each: with the arguments, environment, working folder and streams that
were asked for, and with an interpreter that ends as it always does, its exit functions and threads with it.

Where that cannot be (not on Linux; with a GPU, which forks cannot share), and with GRPO_TOOLKIT_PROCESSES=fresh, every
process starts from nothing.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

IS_FRESH: Final = (
    os.environ.get("GRPO_TOOLKIT_PROCESSES") == "fresh" or sys.platform != "linux" or Path("/dev/nvidiactl").exists()
)
CLIENT: Final = str(Path(__file__).with_name("warm_client.py"))
SHARED: Final = (
    "torch", "torch.distributed.run", "torchvision", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "trl.trainer.grpo_trainer", "peft", "accelerate.commands.launch", "datasets", "scipy.stats", "wandb",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "plotly.graph_objects",
)  # fmt: skip


def python(*, fresh: bool = False) -> list[str]:
    """Return the command that runs Python; to kill it is to kill what it runs.

    Ranks are processes too: `[*python(), "-m", "torch.distributed.run", *flags, *python()[1:], "ranks.py"]`.
    """
    return [sys.executable] if fresh or IS_FRESH else [sys.executable, CLIENT, _listening()]


def run_python(arguments: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` by `subprocess.run`: a program's path, `-m` and a module, or `-c` and code come first."""
    if "stdout" not in options:
        options["capture_output"] = True
    command = [*python(), *map(str, arguments)]
    return subprocess.run(command, **({"stdin": subprocess.DEVNULL, "text": True, "check": False} | options))


@functools.cache
def _listening() -> str:
    """Start the server and return its address; it ends with this process, which alone writes to its standard input."""
    path = str(Path(tempfile.mkdtemp(prefix="grpo-toolkit-warm-")) / "socket")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, __file__, path, str(listener.fileno())]
        _SERVERS.append(
            subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
    return path


_SERVERS: Final[list[subprocess.Popen[bytes]]] = []


def _serve(listener: socket.socket) -> list[str]:
    """Fork for each process that is asked for; return in the fork, with what to run."""
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            shutil.rmtree(Path(listener.getsockname()).parent)
            sys.exit()
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _attend(connection)
        connection.close()
        _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def _attend(connection: socket.socket) -> list[str]:
    """Fork what the client asks for and tell it how that ended; return in the fork."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asked = json.loads(connection.makefile().readline())
    forked = os.fork()
    if forked == 0:
        os.setsid()
        connection.close()
        return _become(streams, **asked)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(forked)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.killpg(forked, signal.SIGKILL)  # and what it has started, as when a client's group is killed
    code = os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])
    if ended in ready:
        connection.sendall(str(code).encode())
    os._exit(0)


def _become(streams: list[int], *, arguments: list[str], environment: dict[str, str], folder: str) -> list[str]:
    """Make this process what a new one would be, but for what it has imported."""
    import numpy as np
    import torch

    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # a seed of its own, as Python's generator gets after a fork
    torch.seed()
    tempfile.tempdir = None
    for temporary in _temporary_folders:  # W&B makes some when it is imported, and removes them at its end
        temporary._finalizer.detach()
        temporary.__init__()
    first = {"-m": folder, "-c": ""}.get(arguments[0], str(Path(arguments[0]).resolve().parent))
    sys.path[:1] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]

    from grpo_toolkit.model.generation.model_process import ModelProcess

    ModelProcess.python = (sys.executable, CLIENT, sys.argv[1])
    return arguments


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    # Frozen objects are not collected, which saves most of what an end costs; extension modules then say they leak.
    atexit.register(_silence)  # the first to be registered, so the last to be called
    for _name in SHARED:
        if importlib.util.find_spec(_name.partition(".")[0]):  # an older stack may be without some
            importlib.import_module(_name)
    _temporary_folders: list[Any] = [one for one in gc.get_objects() if isinstance(one, tempfile.TemporaryDirectory)]
    gc.freeze()
    _arguments = _serve(socket.socket(fileno=int(sys.argv[2])))
    # Here and not deeper: what a program leaves for the interpreter's end, its exit code too, meets nothing of ours.
    sys.argv = _arguments[1:] if _arguments[0] == "-m" else _arguments
    if _arguments[0] == "-m":
        runpy.run_module(_arguments[1], run_name="__main__", alter_sys=True)
    elif _arguments[0] == "-c":
        sys.argv = ["-c", *_arguments[2:]]
        exec(_arguments[1], {"__name__": "__main__"})
    else:
        runpy.run_path(_arguments[0], run_name="__main__")
