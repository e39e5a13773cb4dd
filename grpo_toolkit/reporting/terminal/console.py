"""The console: lines and progress for the person at a terminal."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console

    from grpo_toolkit.latency.bench.progress import Progress


_EVERY_S: Final = 10.0
"""Seconds between two lines of progress in a pipe."""


@contextmanager
def byte_progress(title: str, *, is_shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on standard error with bytes and time left; yields its callback, or None where none is shown."""
    if not is_shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def wandb_hint(facts: Mapping[str, Any]) -> str:
    """Return a W&B run's address, or the command that uploads one that is offline: a line."""
    folder = shlex.quote(_short(facts["folder"]))
    if facts["mode"] == "offline":
        return f"{'W&B':<12}send: wandb sync {folder}"
    return f"{'W&B':<12}{facts.get('url') or f'look: wandb leet {folder}'}"


def _short(folder: str) -> str:
    """Return a folder as it is called from here, where that is below here."""
    return os.path.relpath(folder) if Path(folder).resolve().is_relative_to(Path.cwd()) else folder


def turn_progress(names: str) -> Progress:
    """Say at once what is loaded, and return a callback that says how far the rounds are, and how long they will take.

    Without names, as where servers alone are asked, nothing is said of loading.
    On a terminal one line is kept up to date; into a pipe a line goes every ten seconds.
    """
    if names:
        print(f"loading {names}", file=sys.stderr, flush=True)
    is_terminal = sys.stderr.isatty()
    began: dict[str, float] = {}
    said = -_EVERY_S

    def show_turn(arm: str, turn: int, rounds: int) -> None:
        nonlocal said
        now = time.monotonic()
        if turn < 0:
            began.clear()
            what = "warming up"
        else:
            first = began.setdefault("rounds", now)
            left = f", {_duration((now - first) / turn * (rounds - turn))} to go" if turn else ""
            what = f"round {turn + 1} of {rounds}{left}"
        if is_terminal:
            print(f"\r\033[K{arm}: {what}", end="\r", file=sys.stderr, flush=True)
        elif now - said >= _EVERY_S:
            said = now
            print(f"{arm}: {what}", file=sys.stderr, flush=True)

    return show_turn


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def say(*parts: object) -> None:
    """Print to standard error (standard output is for data), a part a line, above the trainer's bar where one is."""
    console = _console(stderr=True)
    with _without_bars():
        for part in parts:
            console.print(_literal(part), soft_wrap=True)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Take tqdm's bars off the terminal while lines are printed, which would stick to them, and draw them again."""
    bars = sys.modules.get("tqdm")
    if bars is None:
        yield
        return
    with bars.tqdm.external_write_mode(file=sys.stderr):
        yield


def show(*parts: object, style: str | None = None) -> None:
    """Print what a command was asked for, a part a line; what must not be broken, such as a command, is not cut."""
    console = _console(stderr=False)
    for part in parts:
        console.print(_literal(part), style=style, crop=False)


def _console(*, stderr: bool) -> Console:
    """Return a console that is wide enough for a table where it is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120, highlight=False)


def _literal(part: object) -> object:
    from rich.text import Text

    return Text(part) if isinstance(part, str) else part  # a path may hold brackets, which rich would take for markup
