"""Proofs of the KV cache that need no clock: the inputs of each forward of a generation, or of a rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    import torch

VISION_TOWERS: Final = ("visual", "vision_tower", "vision_model")
"""Attribute names under which model families keep their vision tower; the outermost match is the tower."""


@dataclass
class CacheProbe:
    """A record of what each forward of a `generate` call was given, which shows whether a KV cache was in use.

    With a cache the input lengths read [prompt, 1, 1, ...], the cache holds exactly what was fed before, and the
    vision tower runs once. Without one they read [p, p + 1, p + 2, ...], and the tower may run at every step.

        with CacheProbe(model) as probe:
            model.generate(...)
        assert probe.is_cached
    """

    model: torch.nn.Module
    step_lengths: list[int] = field(default_factory=list)
    cache_lengths: list[int | None] = field(default_factory=list)
    vision_calls: int = 0
    _hooks: LookingHooks = field(default_factory=lambda: LookingHooks("proving the KV cache"), repr=False)

    @property
    def is_cached(self) -> bool | None:
        """Return whether every step after the first was fed one token, on top of a cache of all before it.

        None where that was not seen: with a cache that does not tell its length, or where looking failed.
        """
        fed = [sum(self.step_lengths[:step]) for step in range(len(self.step_lengths))]
        if any(length != 1 for length in self.step_lengths[1:]):
            return False
        return None if self._hooks.failed or None in self.cache_lengths else self.cache_lengths == fed

    def __enter__(self) -> CacheProbe:
        inner = base_model(self.model)
        self._hooks.before(inner, self._on_forward)
        tower = vision_tower(inner)
        if tower is not None:
            self._hooks.before(tower, self._on_vision)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _on_forward(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        if tokens is None:
            return
        self.step_lengths.append(int(tokens.shape[1]))
        self.cache_lengths.append(tokens_held(cache_in(kwargs)))

    def _on_vision(self, *_: object) -> None:
        self.vision_calls += 1


class Decoding(Enum):
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


def vision_tower(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the outermost vision tower of a model, or None for a text-only one."""
    towers = (module for name, module in model.named_modules() if name.rpartition(".")[2] in VISION_TOWERS)
    return next(towers, None)


def cache_in(given: Any) -> Any:
    """Return the KV cache among a forward's arguments, or in what `generate` returns; None where there is none.

    `cache` from transformers 5.24 on, where the old name still works, with a warning; `past_key_values` before.
    """
    if not isinstance(given, dict):
        return None
    found = dict.get(given, "cache")  # dict's own: an output of transformers' warns of the old name
    return dict.get(given, "past_key_values") if found is None else found


def tokens_held(cache: Any) -> int | None:
    """Return how many tokens a KV cache holds, or None for one that does not tell.

    Continuous batching keeps the tokens of many requests in one `PagedAttentionCache`, which has no length; layers of
    linear attention keep a state, of no length either. Of a hybrid model the other layers tell: transformers asks the
    first one, which of MiniMax is linear and stays empty.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        held = int(cache.get_seq_length())
    except ValueError:  # linear layers alone (Mamba)
        return None
    layers = (layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length"))
    return held or max((int(layer.get_seq_length()) for layer in layers), default=0)
