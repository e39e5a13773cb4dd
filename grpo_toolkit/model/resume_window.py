"""The moments in which a trainer reads a checkpoint: between its making and `on_train_begin`.

No callback is called then, and none is handed the optimizer before. So three public functions are watched from the
making of a trainer to the beginning of its training, and are as they were afterwards. `Optimizer.load_state_dict` of
torch gets moments in this model's order; what an optimizer of another model loads is let through, and so is a sharded
one's, whose loader goes by names itself. `TrainerState.load_from_json` leaves out what a newer version has written and
this one does not know (`best_global_step` is a TypeError in 4.49). `PreTrainedConfig.from_json_file`, by which it
finds the version that saved, reads on where 5.24 raises at the positions of Llama 3 as 4.x saves them.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.errors import ResumeError
from grpo_toolkit.model.moments import NAMES, Match, matched, named_groups
from grpo_toolkit.model.sharding.gather import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import TrainerState

    from grpo_toolkit.checkpoint.model_families import Family

logger = logging.getLogger(__name__)

_waiting: WeakKeyDictionary[torch.nn.Module, Callable[[Match], object]] = WeakKeyDictionary()
_undo: list[Callable[[], None]] = []


def match_moments(model: torch.nn.Module, then: Callable[[Match], object]) -> None:
    """Match by name what the optimizer of a model loads from now on, until `leave_moments`.

    Args:
        model: a model whose trainer has built no optimizer yet.
        then: called with each match.

    Raises:
        ResumeError: from `load_state_dict`: nothing tells which moments are whose, or some parameters have none.
    """
    _waiting[model] = then
    if not _undo:
        _undo.extend([_watch_optimizers(), _watch_trainer_states(), _watch_configs()])


def leave_moments(model: torch.nn.Module) -> None:
    """Take the watch off a model's optimizer."""
    _waiting.pop(model, None)
    if not _waiting:
        _put_back()


def name_moments(model: torch.nn.Module) -> Callable[[], None]:
    """Write the names of its parameters into the optimizer of a model when it steps first.

    Returns:
        A function that ends the waiting for that step.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        names = named_groups(optimizer, model)
        if names is not None:
            handle.remove()
            for group, own in zip(optimizer.param_groups, names, strict=True):
                group[NAMES] = own

    handle = register_optimizer_step_pre_hook(note)
    return handle.remove


def _watch_optimizers() -> Callable[[], None]:
    from torch.optim import Optimizer

    original = Optimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        if not _waiting:  # their models are gone
            _put_back()
        for model, then in list(_waiting.items()):
            # Accelerate lets a new optimizer load its own state, to bring it to the device: it has no moments yet.
            is_checkpoints = state_dict["state"] and not is_sharded(model)
            names = named_groups(self, model) if is_checkpoints else None
            if names is not None:
                match = matched(state_dict, names, model, _family(model))
                if match is None or match.lacking:
                    raise ResumeError(_why_not(match))
                state_dict = match.state
                then(match)
        original(self, state_dict)

    def undo() -> None:
        Optimizer.load_state_dict = original  # type: ignore[method-assign]

    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
    return undo


def _watch_trainer_states() -> Callable[[], None]:
    from transformers import TrainerState

    original = TrainerState.__dict__["load_from_json"]

    def load_from_json(json_path: str) -> TrainerState:
        try:
            return original.__get__(None, TrainerState)(json_path)
        except TypeError:
            found = read_json(Path(json_path))
            known = {field.name for field in fields(TrainerState)}
            logger.warning(
                "grpo_toolkit: %s was written by another version of transformers; left out: %s",
                json_path,
                ", ".join(sorted(found.keys() - known)),
            )
            return TrainerState(**{name: value for name, value in found.items() if name in known})

    TrainerState.load_from_json = staticmethod(load_from_json)
    return functools.partial(setattr, TrainerState, "load_from_json", original)


def _watch_configs() -> Callable[[], None]:
    from transformers import PretrainedConfig

    original = PretrainedConfig.__dict__["from_json_file"]

    def from_json_file(cls: type[PretrainedConfig], json_file: str) -> PretrainedConfig:
        try:
            return original.__get__(None, cls)(json_file)
        except AttributeError:
            if cls is not PretrainedConfig:
                raise
            found = read_json(Path(json_file))
            return cls(**{name: value for name, value in found.items() if name != "rope_scaling"})

    PretrainedConfig.from_json_file = classmethod(from_json_file)
    return functools.partial(setattr, PretrainedConfig, "from_json_file", original)


def _put_back() -> None:
    while _undo:
        _undo.pop()()


def _family(model: torch.nn.Module) -> Family:
    from transformers import PreTrainedModel

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return family_of(None if inner is None else inner.config.model_type)


def _why_not(match: Match | None) -> str:
    found = "names no parameters, and its groups fit those in training in no order that a version has"
    if match is not None:
        found = f"has no moments for {len(match.lacking)} of the parameters in training ({match.lacking[0]}, ...)"
    return (
        f"the checkpoint's optimizer.pt {found}: the resumed training would be another one; train the parameters that "
        "were trained, or move optimizer.pt and scheduler.pt out of the checkpoint to go on with new moments"
    )
