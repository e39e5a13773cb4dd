"""Calls after every step of `model.generate`, whoever starts it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def after_each_step(model: Any, call: Callable[[], None]) -> Iterator[None]:
    """Call a function when a token has been chosen: as a stopping criterion, so nobody waits and nothing is hooked."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Steps(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            call()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    original = model.generate
    model.generate = lambda **kwargs: original(**kwargs, stopping_criteria=StoppingCriteriaList([Steps()]))
    try:
        yield
    finally:
        del model.generate  # the class's own shows again
