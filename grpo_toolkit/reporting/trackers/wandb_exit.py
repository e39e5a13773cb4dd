"""The end of a process whose W&B server is gone: as short as it can be without losing what W&B has not uploaded.

When a process ends, W&B waits for its service (`wandb-core`), which goes on trying until `WANDB_FINISH_TIMEOUT`.
Measured with wandb 0.31 and our 30 s: 30 s where the server is dead or says 500, 42 s where it says nothing; SIGTERM
changes nothing, and a kill loses what was not flushed, which in a short run is all of it. With a flush every half
second (`WANDB__TRANSACTION_LOG_FLUSH_INTERVAL`) the run's file is whole, exit record included, in the first second.
So where the service is not done by itself, the server is asked; if it answers, the upload goes on as before, and if it
does not, the service is ended once its file was written after the last message: 1.2 s in all where the server is dead.
`wandb sync --include-online` uploads that file later. `run.finish()` called by hand still waits for
`WANDB_FINISH_TIMEOUT`.

This replaces a private method of W&B, because the public setting cannot tell a server that is gone from one that is
slow: it is read when the service starts. Ten rows and 13 files logged right before the end, four processes on two
cores, seconds until the process was gone:

    WANDB_FINISH_TIMEOUT   dead   silent   says 500   1 s an answer
    1                       2.2      1.9        4.1   4.0, no row and 2 of 18 uploads arrived (healthy: no row either)
    2                       4.6      2.7        4.8   4.2, no row and 2 uploads arrived
    10                     12.5     12.2       12.4   5.7, everything arrived
    this module             2.3      3.6        2.7   8.9, everything arrived
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.reporting.terminal.console import say
from grpo_toolkit.reporting.trackers.wandb_environment import FLUSH_S, PROBE_S, api_key, ask, is_users

if TYPE_CHECKING:
    from collections.abc import Callable

_QUICK_S: Final = 0.5
_FLUSHED_S: Final = 2 * FLUSH_S
EXIT_S: Final = _QUICK_S + PROBE_S
"""The most that a server which does not answer may hold up the end of a process."""


def bound_exit(run: Any) -> bool:
    """Keep the end of this process short where the server is gone; returns whether that can be done here.

    Where the user set `WANDB_FINISH_TIMEOUT`, W&B waits as long as that says. A service that someone else started, or
    a W&B that is built otherwise than 0.31, is left alone.
    """
    setup = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    service = getattr(setup, "_connection", None)
    owner: Any = getattr(service, "_proc", None)
    process = getattr(owner, "_process", None)
    if is_users("WANDB_FINISH_TIMEOUT") or service is None or not isinstance(process, subprocess.Popen):
        return False
    file = Path(run.dir).parent / f"run-{run.id}.wandb"
    teardown: Callable[[int], int | None] = type(service).teardown.__get__(service)

    def end(exit_code: int) -> int | None:
        before = _written(file)
        owner.join = lambda: _join(process, file, before)
        return teardown(exit_code)

    service.teardown = end
    return True


def _join(process: subprocess.Popen[bytes], file: Path, before: tuple[int, int] | None) -> int:
    started = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_QUICK_S)
    key = api_key()
    problem = None if key is None else ask(key, PROBE_S)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(None if problem is None else max(0.0, started + _FLUSHED_S - time.monotonic()))
    if _written(file) == before:  # its last rows are still in memory alone
        return process.wait()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # W&B's threads still write into its service's socket
    process.kill()
    process.wait()
    lost = f"W&B: the server does not work ({problem}); what it did not get is on disk"
    online = "" if file.parent.name.startswith("offline-") else "--include-online "  # which `sync` skips otherwise
    say(f"{lost}\n  upload: wandb sync {online}{file.parent}")
    return 0


def _written(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
