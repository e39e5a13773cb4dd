"""A trial of the fast way against the plain one, on a rollout's own inputs, for those who let a clock decide."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.hardware.synchronize import synchronize
from grpo_toolkit.model.live_model import random_state_kept
from grpo_toolkit.model.sharding.ranks import exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

WANTED: Final = 1.2
"""The number of times that the fast way must be as fast as the plain one."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The seconds of one rollout by each way. `is_fast_worth_it` is the first rank's word, the same on all."""

    fast_s: float
    plain_s: float
    is_fast_worth_it: bool

    @property
    def ratio(self) -> float:
        return self.plain_s / self.fast_s


def try_out(
    fast: Callable[[dict[str, Any]], Any],
    plain: Callable[[dict[str, Any]], Any],
    call: dict[str, Any],
    *,
    device: torch.device,
) -> Trial:
    """Time both ways on copies of the same inputs, the random state kept; collective.

    The fast way runs once before, since that compiles. Every rank tries, and the first one's clock decides.

    Args:
        fast, plain: make a rollout from the arguments of `generate`.
        call: these arguments.
        device: that they run on.
    """
    word: str | None = "plain"
    try:
        with random_state_kept():
            fast(_copied(call))
            fast_s = _seconds(fast, call, device)
            plain_s = _seconds(plain, call, device)
        word = "fast" if plain_s >= WANTED * fast_s else "plain"
    finally:  # the others wait for this rank's word, also where it failed
        first = exchange(word)[0]
    return Trial(fast_s=fast_s, plain_s=plain_s, is_fast_worth_it=first == "fast")


def _seconds(way: Callable[[dict[str, Any]], Any], call: dict[str, Any], device: torch.device) -> float:
    given = _copied(call)
    synchronize(device)
    began = perf_counter()
    way(given)
    synchronize(device)
    return perf_counter() - began


def _copied(call: dict[str, Any]) -> dict[str, Any]:
    import copy

    import torch

    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value) for name, value in call.items()
    }
