"""A live model inside its wrappers: the transformers model, its configs, the random state around it."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from grpo_toolkit.checkpoint.generation_defaults import Level


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DDP, `torch.compile` and PEFT wrappers: it has config and `generate`."""
    from transformers import PreTrainedModel

    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "module"):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            raise TypeError(f"{type(model).__name__} holds no transformers model; pass a PreTrainedModel or a wrapper")
    return inner


def is_tied(model: torch.nn.Module) -> bool | None:
    """Return whether the output embeddings are the input embeddings; None where the model does not have both."""
    inner = base_model(model)
    inputs, outputs = (
        # Inside what PEFT may have put around it: LoRA, or a trained copy.
        getattr(module, "base_layer", getattr(module, "original_module", module))
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings())
    )
    return None if inputs is None or outputs is None else getattr(outputs, "weight", None) is inputs.weight


def config_levels(config: PretrainedConfig, here: Level = ()) -> Iterator[tuple[Level, PretrainedConfig]]:
    """Return the config and every config nested in it, each with its path."""
    from transformers import PretrainedConfig

    yield here, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from config_levels(value, (*here, name))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (CPU and this process's GPU) on exit."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only this process's GPU: asking for the others would make a context on each of them, from every rank.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
