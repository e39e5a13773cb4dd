"""The progress bar of a measurement, in a terminal or a notebook."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Progress = Callable[[str, int, int], None]


@contextmanager
def shown(progress: Progress | bool | None, arms: Sequence[str]) -> Iterator[Progress | None]:
    """Yield what to call with each answer.

    Args:
        progress: a function as it is; False shows nothing, True a bar, None a bar where a person is likely to see it:
            in a terminal or a notebook.
        arms: the names.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not _is_seen()):
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=f"loading {', '.join(arms)}", leave=False, unit="answer") as bar:
        yield lambda arm, turn, rounds: _show(bar, arm, turn, total=rounds * len(arms))


def _show(bar: Any, arm: str, turn: int, *, total: int) -> None:
    if turn < 0:
        bar.set_description(f"warming up {arm}")
        return
    if bar.total is None:
        bar.reset(total=total)
    bar.set_description(arm, refresh=False)
    bar.update()


def _is_seen() -> bool:
    return "ipykernel" in sys.modules or sys.stderr.isatty()
