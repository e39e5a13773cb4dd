"""The ranks of a training: their number, their exchange of errors, and failing together."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Iterator


PATIENCE: Final = timedelta(days=1)
"""The time that ranks wait for one that exports or measures. NCCL's own limit is ten minutes, and ends the run."""


def rank() -> int:
    """Return this process's rank; 0 where there is one process."""
    return int(_distributed().get_rank()) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of processes."""
    distributed = _distributed()
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


@contextmanager
def failing_together() -> Iterator[None]:
    """Make what fails inside on one rank fail on all, which would wait in the next collective; collective.

    Raises:
        PeerError: on the ranks where nothing went wrong.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # said to the others before it is raised
        problem = error
    said = exchange(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for number, word in enumerate(said):
        if word is not None:
            raise PeerError(f"rank {number}: {word}")


def exchange(problem: str | None) -> list[str | None]:
    """Return what went wrong on each rank, the same list everywhere; collective, and so also a barrier.

    It waits for a rank that is busy for hours, on the CPU: not on NCCL, which would occupy the waiting GPUs, and end
    the run after ten minutes.
    """
    if world_size() == 1:
        return [problem]
    said: list[str | None] = [None] * world_size()
    _distributed().all_gather_object(said, problem, group=_patient_group(_distributed().group.WORLD))
    return said


@functools.lru_cache(maxsize=1)
def _patient_group(world: object) -> Any:
    # Keyed by the world's own group: one that was destroyed and made anew asks for another.
    return _distributed().new_group(backend="gloo", timeout=PATIENCE)


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
