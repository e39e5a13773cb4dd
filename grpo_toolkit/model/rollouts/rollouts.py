"""Rollouts of a model in training, by the fast way: the seam, and what may go through it.

TRL's and PEFT's calls both end at `generate` of the transformers model inside all wrappers. There an instance method
takes rollouts, which are known by `disable_compile=True`: TRL hard-wires it, and nobody else sets it. Everything that
is not known to be answered the same goes on to the class's `generate`, as every call does after a failure.
"""

from __future__ import annotations

import copy
import traceback
import weakref
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.model.generation.decode_ahead import deferred_stops
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts import static_caches
from grpo_toolkit.model.rollouts.rollout_kl import SampledScores, scores_for
from grpo_toolkit.model.rollouts.shared_prefill import distinct_rows, prefill
from grpo_toolkit.model.rollouts.supported import HANDED_ON, why_plain
from grpo_toolkit.model.rollouts.trial import Trial, try_out
from grpo_toolkit.model.rollouts.weights_copy import WeightsCopy, is_switched_off
from grpo_toolkit.model.sharding.gather import is_sharded
from grpo_toolkit.model.sharding.ranks import exchange, failing_together

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import torch

MEASURED_EVERY: Final = 10
"""Rollouts from one that is measured to the next: the live model's forward of a few rows takes its time."""

_SHAPES: Final = 64
"""The number of batch sizes and lengths that may be compiled in one process; torch stops compiling after eight."""

_installed: WeakKeyDictionary[torch.nn.Module, weakref.ref[FastRollouts]] = WeakKeyDictionary()
"""Held by whoever made them: a training that crashed leaves no model and no copy of it behind."""


class FastRollouts:
    """A live model's rollouts: compiled, prefilled once a prompt, from weights that need no casting.

        rollouts = FastRollouts(model, dtype=torch.bfloat16)
        trainer.train()
        rollouts.close()

    On a GPU the decode step is compiled, with CUDA graphs; elsewhere it is the same step without. The weights are
    copied lazily, when a rollout begins: `mark_dirty` says that they have changed where torch cannot know.

    Where weights are sharded over processes (FSDP2, ZeRO-3), they are gathered into the copy on all ranks at once:
    a rollout goes the fast way on all of them or on none, and one that fails on one rank is made again on all.

    Args:
        model: a model for which `why_unsupported` has nothing to say.
        dtype: what float32 weights are computed in under autocast; None where there is none.
        compiled_rows: batch sizes whose steps are compiled, since each is compiled anew; None is all.
        on_failure: called once with what went wrong, after which all rollouts go the plain way.
        on_plain: called with why a rollout goes the plain way, where the next may not.
        on_sampled: called with inputs, output, `SampledScores` and settings of the first rollout and each tenth after.
        on_trial: has the first rollout be made by both ways, and is called with which is worth it, on all ranks.

    Attributes:
        count: rollouts that went the fast way.
        prefilled: rows that were prefilled for these.
        compiled: batch sizes and cache lengths for which decode steps were compiled.
        on_prefilled: called in a rollout, between prefill and decoding.
        compile_config: as `generate` takes it; None is the library's own, for one shape after the other.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        compiled_rows: Collection[int] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        on_plain: Callable[[str], None] | None = None,
        on_sampled: Callable[[dict[str, Any], torch.Tensor, SampledScores, Any], None] | None = None,
        on_trial: Callable[[Trial], None] | None = None,
    ) -> None:
        self.live: Any = base_model(model)
        self.dtype = dtype
        self.compiled_rows = compiled_rows
        self.count = 0
        self.prefilled = 0
        self.compiled: set[tuple[int, int]] = set()
        self.compile_config: Any = None
        self.on_prefilled: Callable[[], None] | None = None
        self._on_failure = on_failure
        self._on_plain = on_plain
        self._on_sampled = on_sampled
        self._on_trial = on_trial
        self._is_dirty = True
        self._is_collective = is_sharded(model)
        self._before: Any = None
        self._copy: WeightsCopy | None = None
        self._caches: static_caches.StaticCaches | None = None
        self.install()

    @property
    def compiled_for(self) -> int | None:
        """The largest batch whose steps are compiled; None where all are."""
        return None if self.compiled_rows is None else max(self.compiled_rows)

    def install(self) -> None:
        """Take the model's rollouts, also those of a method that says it does no more than gather the weights.

        Such a method has an attribute `gathers` that is true; it is called for what goes the plain way.

        Raises:
            UnsupportedError: somebody else has.
        """
        before = vars(self.live).get("generate")
        if before is not None and not (_is_fsdps(before) or getattr(before, "gathers", False)):
            raise UnsupportedError(f"{type(self.live).__name__}.generate has been replaced on the instance")
        self._before = before
        _installed[self.live] = weakref.ref(self)
        # Bound, so that a deep copy of the model has a method of its own.
        self.live.generate = MethodType(_generate, self.live)

    def uninstall(self) -> None:
        """Give `generate` back to the model's class; somebody's wrapper around ours stays, and calls that."""
        if rollouts_of(self.live) is self:
            del _installed[self.live]
            if getattr(vars(self.live).get("generate"), "__func__", None) is _generate:
                del self.live.generate
                if self._before is not None:
                    self.live.generate = self._before

    def close(self) -> None:
        """Give `generate` back to the model's class, and the memory to training."""
        self.uninstall()
        self._copy = self._caches = None

    def mark_dirty(self) -> None:
        """Have the weights copied anew before the next rollout."""
        self._is_dirty = True

    def generate(self, call: dict[str, Any]) -> Any:
        """Answer one call of `generate`, or return None for the plain way."""
        config = call.get("generation_config")
        if config is None or config.disable_compile is not True:
            return None
        if self._on_trial is not None and not config.do_sample:
            return None  # an evaluation, of which some ranks may have no part
        reason = "a disabled adapter" if is_switched_off(self.live) else why_plain(call)
        reason = self._first_of_all_ranks(reason)
        if reason is not None:
            if self._on_plain is not None:
                self._on_plain(reason)
            return None
        try:
            with self._together():
                return self._rollout(call) if self._is_worth_it(call) else None
        except Exception as error:  # training goes on, whatever a compiler says
            self.close()
            if self._on_failure is None:
                raise
            self._on_failure(error)
            _let_go_of_frames(error)
            return None

    def _is_worth_it(self, call: dict[str, Any]) -> bool:
        """Try the fast way at the first rollout, if that is wanted; all are plain where it is not worth it."""
        tell, self._on_trial = self._on_trial, None
        if tell is None:
            return True
        measure, self._on_sampled = self._on_sampled, None
        fast, plain = partial(self._tried, self._rollout), partial(self._tried, self._plainly)
        try:
            found = try_out(fast, plain, call, device=self.live.device)
        finally:
            self._on_sampled = measure
        self.count = self.prefilled = 0
        if not found.is_fast_worth_it:
            self.close()
        tell(found)
        return found.is_fast_worth_it

    def _tried(self, way: Callable[[dict[str, Any]], Any], call: dict[str, Any]) -> Any:
        """Make a rollout of a trial: where weights are sharded, no rank begins the next one alone."""
        with self._together():
            return way(call)

    def _together(self) -> AbstractContextManager[None]:
        return failing_together() if self._is_collective else nullcontext()

    def _plainly(self, call: dict[str, Any]) -> Any:
        generate = self._before if self._before is not None else MethodType(type(self.live).generate, self.live)
        return generate(**call)

    def _first_of_all_ranks(self, reason: str | None) -> str | None:
        """Return what a rank has to say, the same on all where weights are sharded, or a trial is to come."""
        if not self._is_collective and self._on_trial is None:
            return reason
        return next((word for word in exchange(reason) if word is not None), None)

    def _refreshed(self) -> WeightsCopy:
        """Return the copy with the live weights in it."""
        if self._copy is None:
            with self._together():
                self._copy = WeightsCopy(self.live, dtype=self.dtype)
            self._caches = static_caches.StaticCaches(self._copy.model.config)
        is_dirty = self._is_dirty
        if self._is_collective:
            is_dirty = self._first_of_all_ranks("stale" if is_dirty or self._copy.is_stale else None) is not None
        self._copy.refresh(is_dirty=is_dirty)
        self._is_dirty = False
        return self._copy

    def _rollout(self, call: dict[str, Any]) -> torch.Tensor:
        import torch

        copied = self._refreshed()
        assert self._caches is not None
        model: Any = copied.model
        inputs = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
        rows = distinct_rows(model.config, inputs)
        given = call["generation_config"]
        settings = {name: call[name] for name in HANDED_ON if call.get(name) is not None}
        settings["synced_gpus"] = False  # the copy is whole: no rank goes on for the sake of others
        is_measured = self._on_sampled is not None and self.count % MEASURED_EVERY == 0
        scores = scores_for(given) if is_measured else None
        if scores is not None:
            settings["logits_processor"] = [*settings.get("logits_processor", ()), scores]
        with _as_a_compiled_step_wants_it(self.live.device):
            tokens = inputs["input_ids"].shape[1] + given.max_new_tokens
            cache = self._caches.filled(prefill(model, rows), rows.index, tokens)
            if self.on_prefilled is not None:
                self.on_prefilled()
            config = self._config(given, cache)
            if self.live.device.type == "cuda" and not config.disable_compile:
                self.compiled.add((cache.batch_size, cache.max_cache_len))
            output: torch.Tensor = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                cache=cache,
                generation_config=config,
                **settings,
            )
        self.count += 1
        self.prefilled += rows.count
        if scores is not None and self._on_sampled is not None:
            self._on_sampled(inputs, output, scores, given)
        return output

    def _config(self, given: Any, cache: Any) -> Any:
        """Return the settings of the decode steps: sampling as given, compiled where that is worth its time."""
        from transformers import CompileConfig

        config = copy.deepcopy(given)
        config.cache_implementation = None  # the cache is handed over
        config.disable_compile = self.compiled_rows is not None and cache.batch_size not in self.compiled_rows
        config.compile_config = self.compile_config
        if self.compile_config is None and self.live.device.type == "cuda" and not any(cache.is_sliding):
            # Else torch compiles the second length for all lengths: other kernels than in a training that is resumed
            # and begins with that one. A sliding window counts its tokens in Python, so there it has to.
            config.compile_config = CompileConfig(dynamic=False)
        return config


def rollouts_of(model: torch.nn.Module) -> FastRollouts | None:
    """Return the `FastRollouts` that answers for a model, or None where the model generates by itself."""
    found = _installed.get(base_model(model))
    return None if found is None else found()


def _generate(model: Any, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
    """Stand in for a live model's `generate`."""
    rollouts = rollouts_of(model)
    plain = None if rollouts is None else rollouts._before
    if rollouts is not None:
        call = kwargs | {"generation_config": generation_config}
        if inputs is not None:
            call["input_ids"] = inputs
        output = rollouts.generate(call)
        if output is not None:
            return output
    if plain is None:
        return type(model).generate(model, inputs, generation_config, **kwargs)
    return plain(inputs, generation_config, **kwargs)


def _is_fsdps(generate: Any) -> bool:
    """Return whether it is the class's, made one of FSDP2's forwards as the trainer does it."""
    model, wrapped = getattr(generate, "__self__", None), getattr(generate, "__wrapped__", None)
    if not hasattr(model, "unshard") or wrapped is None:
        return False
    return getattr(wrapped, "__func__", None) is getattr(type(model), "generate", None)


def _let_go_of_frames(error: BaseException | None) -> None:
    """Free what an error's tracebacks hold, which somebody keeps: a cache, and a copy of the weights."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def _as_a_compiled_step_wants_it(device: torch.device) -> Iterator[None]:
    """Switch autocast off, check stops late, and allow more compiled shapes than torch does by itself."""
    import torch
    import torch._dynamo

    with ExitStack() as stack:
        stack.enter_context(deferred_stops())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        settings: Any = torch._dynamo.config
        name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
        stack.enter_context(settings.patch(**{name: _SHAPES}))
        yield
