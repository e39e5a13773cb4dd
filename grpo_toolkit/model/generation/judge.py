"""The reward of single answers, by the reward functions of a training, called as TRL calls them."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)

_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns of a row that TRL hands to no reward function by their own name."""


@dataclass(kw_only=True)
class Judge:
    """The reward functions of a training, for answers to some of its rows.

    Attributes:
        functions: as TRL takes them; reward models, which are no functions, and async ones are left out.
        weights: of all functions given, in their order; None pays all alike.
        rows: the dataset rows that are asked, one after the other and then again.
        state: the trainer's state, which some functions ask for.
    """

    functions: Sequence[Any]
    rows: Sequence[Mapping[str, Any]]
    weights: Sequence[float] | None = None
    state: Any = None
    _failed: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The names of the functions that pay, with commas between."""
        return ", ".join(getattr(function, "__name__", "reward") for function, _ in self._paying())

    def reward(self, number: int, text: str, tokens: Sequence[int]) -> float | None:
        """Return what all functions pay for an answer together; None where there is no row or none pays.

        Args:
            number: of the request, from 0 on.
            text: the answer, without special tokens.
            tokens: its ids.
        """
        if not self.rows:
            return None
        row = self.rows[number % len(self.rows)]
        paid = [
            weight * value
            for function, weight in self._paying()
            if (value := self._paid(function, row, text, tokens)) is not None
        ]
        return sum(paid) if paid else None

    def _paying(self) -> list[tuple[Callable[..., Any], float]]:
        weights = self.weights or [1.0] * len(self.functions)
        return [
            (function, float(weight))
            for function, weight in zip(self.functions, weights, strict=False)
            if callable(function) and not hasattr(function, "parameters") and not inspect.iscoroutinefunction(function)
        ]

    def _paid(
        self, function: Callable[..., Any], row: Mapping[str, Any], text: str, tokens: Sequence[int]
    ) -> float | None:
        """Return what one function pays; a user's function that raises is left out from then on, with one warning."""
        name = getattr(function, "__name__", "reward")
        if name in self._failed:
            return None
        prompt = row.get("prompt")
        completion: Any = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        columns = {key: [value] for key, value in row.items() if key not in _NOT_COLUMNS}
        try:
            paid = function(
                prompts=[prompt],
                completions=[completion],
                completion_ids=[list(tokens)],
                trainer_state=self.state,
                **columns,
            )[0]
        except Exception as error:  # a user's code: the measurement goes on without it
            self._failed.add(name)
            logger.warning("grpo_toolkit: the reward %s cannot be asked (%s: %s)", name, type(error).__name__, error)
            return None
        return None if paid is None or math.isnan(float(paid)) else float(paid)
