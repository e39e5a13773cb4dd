"""A watch over the rollouts of a training: with or without a cache, seen from the inputs of the forwards."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.cache_probe import cache_in, tokens_held
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    import torch


class Decoding(enum.Enum):
    """The way in which a generation was seen to decode."""

    CACHED = "with its KV cache"
    RECOMPUTED = "without a KV cache: every step computes the whole sequence again"
    FORGETFUL = "one token a step, but with an empty KV cache: the text is wrong"


class RolloutWatch:
    """A hook that sees how a model in training decodes, whoever calls `generate`, until it knows.

    The forwards of a rollout stand between those of log-probabilities and of training. They are told by their inputs:
    no gradient is wanted, and either one token follows the prompt of the same batch, or the same batch comes again
    with one token more. It lets go, too, of a rollout by continuous batching, which has a cache of its own.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: Decoding | None = None
        self._before: torch.Tensor | None = None
        self._hooks = LookingHooks("watching how rollouts decode")
        self._hooks.before(base_model(model), self._on_forward)

    def close(self) -> None:
        """Take the hook off the model."""
        self._hooks.close()
        self._before = None

    def _on_forward(self, _module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        tokens, before = kwargs.get("input_ids"), self._before
        if tokens is None or torch.is_grad_enabled():
            self._before = None
            return
        held = tokens_held(cache_in(kwargs))
        if held is None:
            self.close()
            return
        self._before = tokens
        if before is None or before.shape[0] != tokens.shape[0] or before.shape[1] < 2:
            return
        if tokens.shape[1] == 1:
            self._conclude(Decoding.CACHED if held == before.shape[1] else Decoding.FORGETFUL)
        elif tokens.shape[1] == before.shape[1] + 1 and held == 0 and bool((tokens[:, :-1] == before).all()):
            self._conclude(Decoding.RECOMPUTED)

    def _conclude(self, seen: Decoding) -> None:
        self.seen = seen
        self.close()
