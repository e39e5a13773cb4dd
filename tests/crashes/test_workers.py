"""A training that is killed while a process of ours verifies for it: nothing of that process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from grpo_toolkit.model.generation.model_process import worker_environment

if TYPE_CHECKING:
    from pathlib import Path

PARENT = """
import sys, time
from pathlib import Path
from grpo_toolkit.export.verification_process import Worker

with Worker(Path(sys.argv[1])) as worker:
    print(worker._process.pid, flush=True)
    if sys.argv[2] == "loaded":
        worker.report
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a group of processes")
@pytest.mark.parametrize("state", ["loading", "loaded"])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_a_worker_stays_when_its_parents_group_is_killed(
    kind: signal.Signals, state: str, qwen: Path, tmp_path: Path
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(qwen), state],
        env=worker_environment() | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    assert list(tmp_path.glob("grpo-toolkit-worker-*"))
    os.killpg(parent.pid, kind)
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (list(tmp_path.glob("grpo-toolkit-worker-*")) or _lives(child)):
        time.sleep(0.1)
    assert not list(tmp_path.glob("grpo-toolkit-worker-*"))
    assert not _lives(child)


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE  # which nobody may have asked after yet
    except psutil.NoSuchProcess:
        return False
