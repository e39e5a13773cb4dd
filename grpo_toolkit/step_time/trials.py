"""The predicted savings put to the test: cures tried on copied inputs of a training that is over.

What a rule predicts is arithmetic on phases. Where the cure is a callback of ours, it can be measured: the same
micro-batch forward and backward with and without packed vision, the same rollout by the plain way and the fast one.
"""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.model.attention.packed_vision import packed_vision
from grpo_toolkit.model.hardware.synchronize import synchronize
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model, random_state_kept
from grpo_toolkit.model.rollouts.rollouts import FastRollouts
from grpo_toolkit.model.rollouts.supported import why_unsupported
from grpo_toolkit.model.rollouts.trial import try_out
from grpo_toolkit.step_time.causes.cause import FAST, PACKED
from grpo_toolkit.step_time.rows import TriedCure
from grpo_toolkit.step_time.seams.forward_shapes import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from grpo_toolkit.step_time.rows import StepExplanation
    from grpo_toolkit.step_time.seams.notes import StepNotes

ROUNDS: Final = 3
"""Passes by each arm that are timed, in turns, after one each to warm up."""


@dataclass(frozen=True, kw_only=True)
class KeptInputs:
    """Copies, on the CPU, of what a step's last forward and last rollout were given; None where there was none.

    `modes` is how the step found each module: in training, and checkpointing (None: it cannot).
    """

    forward: dict[str, Any] | None = None
    rollout: dict[str, Any] | None = None
    modes: tuple[tuple[torch.nn.Module, bool, bool | None], ...] = ()


def keep_inputs(notes: StepNotes, model: torch.nn.Module) -> KeptInputs:
    """Copy the inputs of a step of a model that was looked at closely."""
    return KeptInputs(
        modes=_modes(model),
        forward=None if notes.given is None else _copied(notes.given, "cpu"),
        rollout=None if notes.call is None else _copied(notes.call, "cpu"),
    )


def try_cures(
    model: torch.nn.Module,
    kept: KeptInputs,
    explanation: StepExplanation,
    *,
    forwards: float,
    rollouts: float,
    computed_in: torch.dtype | None,
    now: Callable[[], float] = time.perf_counter,
) -> list[TriedCure]:
    """Measure what the cures that are callbacks of ours save of a step, for the causes that were found.

    The model is as before afterwards, its gradients and the random state too. For one process that has all weights.

    Args:
        model: after its training.
        kept: inputs to try with.
        explanation: the causes, and what their cures are predicted to save.
        forwards, rollouts: in a step, on average.
        computed_in: the dtype of autocast; None where there is none.
        now: seconds.
    """
    found = []
    packed = _predicted(explanation, PACKED, ("forward", "backward"))
    if packed and kept.forward is not None:
        with _as_trained(model, kept):
            saved = _packing_saves(model, kept.forward, computed_in=computed_in, now=now)
        found.append(_tried(PACKED, packed, saved * forwards))
    fast = _predicted(explanation, FAST, ("rollout",))
    if fast and kept.rollout is not None and why_unsupported(model) is None:
        found.append(_tried(FAST, fast, _fast_rollout_saves(model, kept.rollout, computed_in=computed_in) * rollouts))
    return found


def _tried(line: str, predicted: dict[str, float], saved_s: float) -> TriedCure:
    return TriedCure(line=line, causes=list(predicted), predicted_s=sum(predicted.values()), measured_s=saved_s)


def _predicted(explanation: StepExplanation, line: str, phases: tuple[str, ...]) -> dict[str, float]:
    """Return the seconds that a cure is predicted to save in some phases, by cause."""
    savings = {
        found.cause: sum(value for name, value in found.savings_s.items() if name.partition("/")[0] in phases)
        for found in explanation.causes
        if found.line == line
    }
    return {cause: seconds for cause, seconds in savings.items() if seconds > 0}


def _packing_saves(
    model: torch.nn.Module, given: dict[str, Any], *, computed_in: torch.dtype | None, now: Callable[[], float]
) -> float:
    """Return the seconds that packed vision saves of one forward and backward."""
    live: Any = base_model(model)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with random_state_kept(), _gradients_kept(live):
        for turn in range(ROUNDS + 1):
            for is_packed in (False, True) if turn % 2 == 0 else (True, False):
                with packed_vision(live) if is_packed else nullcontext():
                    inputs = _copied(given, live.device)
                    synchronize(live.device)
                    began = now()
                    _learn(live, inputs, computed_in=computed_in)
                    synchronize(live.device)
                    seconds[is_packed].append(now() - began)
    plain_s, packed_s = (statistics.median(seconds[is_packed][1:]) for is_packed in (False, True))
    return plain_s - packed_s


def _learn(live: Any, inputs: dict[str, Any], *, computed_in: torch.dtype | None) -> None:
    import torch

    casting = nullcontext() if computed_in is None else torch.autocast(live.device.type, dtype=computed_in)
    with torch.enable_grad():
        with casting:
            output = live(**inputs)
        wanted = [tensor.float().sum() for tensor in tensors_in(output) if tensor.requires_grad]
        torch.autograd.backward(wanted)
    for parameter in live.parameters():
        parameter.grad = None


def _fast_rollout_saves(model: torch.nn.Module, call: dict[str, Any], *, computed_in: torch.dtype | None) -> float:
    """Return the seconds that the fast way saves of one rollout."""
    import torch

    live: Any = base_model(model)

    def plain(given: dict[str, Any]) -> Any:
        return type(live).generate(live, **given)

    with inference_ready(model), torch.no_grad():
        rollouts = FastRollouts(model, dtype=computed_in)

        def fast(given: dict[str, Any]) -> Any:
            output = rollouts.generate(given)
            if output is None:
                raise UnsupportedError("the rollout cannot go the fast way")
            return output

        try:
            found = try_out(fast, plain, _copied(call, live.device), device=live.device)
        finally:
            rollouts.close()
    return found.plain_s - found.fast_s


@contextmanager
def _as_trained(model: torch.nn.Module, kept: KeptInputs) -> Iterator[None]:
    """Have the modules train and checkpoint as in the step: what `KVCacheCallback` leaves at the end does neither."""
    before = _modes(base_model(model))
    try:
        _set_modes(kept.modes)
        yield
    finally:
        _set_modes(before)


def _modes(model: torch.nn.Module) -> tuple[tuple[torch.nn.Module, bool, bool | None], ...]:
    return tuple((module, module.training, vars(module).get("gradient_checkpointing")) for module in model.modules())


def _set_modes(modes: Iterable[tuple[torch.nn.Module, bool, bool | None]]) -> None:
    module: Any
    for module, is_training, is_checkpointing in modes:
        module.training = is_training
        if is_checkpointing is not None:
            module.gradient_checkpointing = is_checkpointing


@contextmanager
def _gradients_kept(live: torch.nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in live.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _copied(given: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    return {
        name: value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
