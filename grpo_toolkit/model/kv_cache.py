"""The KV cache of a live model: off in the training forward, on in rollouts, ready for inference.

Without a KV cache every decode step recomputes the whole prompt. In transformers 4.x, and in 5.x for models whose
`forward` takes no `mm_encoder_outputs`, it also runs the vision tower again, because `generate` then keeps the image
inputs after the prefill. Three switches decide, and they are easy to confuse:

* `config.use_cache`, at the top or nested (`text_config`): read by the training forward. Gradient checkpointing
  needs it off. transformers >= 5 ends `Trainer.__init__` by setting the top one to False, with or without
  checkpointing, and never puts it back.
* `generation_config.use_cache`: read by `generate`. Rollouts decode without a cache when a base was saved with
  false here, because TRL's rollout config leaves the key unset and the model's value fills it.
* `module.gradient_checkpointing` together with `module.training`: checkpointed layers of transformers 4.50 to 5.23
  drop their cache, from 5.24 on only where a gradient is wanted. Right after `train()` both are still on; `generate`
  then feeds one token a step to layers that remember nothing, and the text is wrong, not only slow. Leaving either
  state cures it.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.model.live_model import base_model, config_levels, random_state_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PretrainedConfig

    from grpo_toolkit.checkpoint.generation_defaults import Level


def cache_flags(config: PretrainedConfig) -> dict[Level, Any]:
    """Return `use_cache` at every level that has one now, as {level: value}."""
    return {level: vars(node)["use_cache"] for level, node in config_levels(config) if "use_cache" in vars(node)}


def set_cache_flags(config: PretrainedConfig, flags: dict[Level, Any]) -> None:
    """Make `use_cache` exactly `flags`: set where given, deleted at every other level."""
    for level, node in config_levels(config):
        value = flags.get(level, ABSENT)
        if value is not ABSENT:
            node.use_cache = value
        elif "use_cache" in vars(node):
            del node.use_cache


def is_checkpointing(model: torch.nn.Module) -> bool:
    """Return whether gradient checkpointing is on anywhere in the model."""
    return bool(_checkpointed(model))


def _checkpointed(model: torch.nn.Module) -> list[Any]:
    # The flag is switched module by module rather than through gradient_checkpointing_disable(), which would forget
    # the kwargs of the checkpointing function and has another name in every second release.
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing") is True]


def disable_cache_for_training(model: torch.nn.Module) -> None:
    """Switch `use_cache` off at every level that has the key, as gradient checkpointing needs it."""
    config = base_model(model).config
    set_cache_flags(config, dict.fromkeys(cache_flags(config), False))


def enable_cache_for_generation(model: torch.nn.Module) -> bool:
    """Make `generate` use the cache whatever the base says; returns whether something had to change.

    `_from_model_config` is cleared because transformers 4.x otherwise rebuilds the generation config from the model
    config, where training has just switched the cache off.
    """
    generation_config = base_model(model).generation_config
    if generation_config is None:
        return False
    was_off = generation_config.use_cache is False
    if generation_config.use_cache is not True:
        generation_config.use_cache = True
    generation_config._from_model_config = False
    return was_off


def leave_training(model: torch.nn.Module) -> None:
    """Leave a trained model as a user expects to find it: eval mode, no gradient checkpointing."""
    for module in _checkpointed(model):
        module.gradient_checkpointing = False
    model.eval()


@contextmanager
def inference_ready(model: torch.nn.Module, *, packed_vision: bool = False) -> Iterator[torch.nn.Module]:
    """Make a live model ready to generate, and put everything back on exit, also after an exception.

    Inside: KV cache on, gradient checkpointing off, eval mode (so no dropout). Restored afterwards: each module's
    training flag, checkpointing with its kwargs, `use_cache` in config and generation config, and the random state
    of Python, NumPy and torch, so that a measurement in mid-training does not change the training.

    Args:
        model: a transformers model or a wrapper around one (PEFT, DDP, `torch.compile`).
        packed_vision: whether its vision tower makes one attention call a layer and encodes each distinct image of a
            batch once, as `PackedVisionCallback` has it in a training; answers differ by rounding.

    Yields:
        The same model.
    """
    from grpo_toolkit.model.attention import packed_vision as packing

    inner = base_model(model)
    modules = list(model.modules())
    training = [module.training for module in modules]
    checkpointed = _checkpointed(model)
    flags = cache_flags(inner.config)
    generation_config = inner.generation_config
    generation_state = None if generation_config is None else dict(vars(generation_config))
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        try:
            model.eval()
            for module in checkpointed:
                module.gradient_checkpointing = False
            set_cache_flags(inner.config, dict.fromkeys(flags, True))
            enable_cache_for_generation(model)
            if packed_vision:
                stack.enter_context(packing.packed_vision(model))
            yield model
        finally:
            for module, was_training in zip(modules, training, strict=True):
                module.training = was_training
            for module in checkpointed:
                module.gradient_checkpointing = True
            set_cache_flags(inner.config, flags)
            if generation_config is not None and generation_state is not None:
                vars(generation_config).clear()
                vars(generation_config).update(generation_state)
