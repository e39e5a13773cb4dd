"""A live model's adapter: checked before training, and saved as a folder that a merge can read."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.merge.adapter import find_adapter, refuse_options
from grpo_toolkit.model.live_model import base_model, is_tied

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from grpo_toolkit.checkpoint.weights.base_weights import Base


def is_adapted(model: torch.nn.Module) -> bool:
    """Return whether the model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def refuse_unmergeable(model: Any) -> None:
    """Raise, before a training, for adapters that could not be merged after it.

    Raises:
        UnsupportedError: not exactly one adapter is active, an option that is not merged, or a copy of embeddings that
            the base ties to their other end.
    """
    if not is_adapted(model):
        return
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UnsupportedError(f"{len(active)} adapters are active ({', '.join(active)}); activate the one to export")
    config = model.peft_config[active[0]]
    refuse_options(config.to_dict(), Path(f"adapter {active[0]!r}"))
    embeddings = [(n, m) for n, m in model.named_modules() if n.endswith(("embed_tokens", "lm_head"))]
    replaced = [name for name, module in embeddings if hasattr(module, "modules_to_save")]
    if replaced and is_tied(model) and not getattr(config, "ensure_weight_tying", False):
        raise UnsupportedError(
            f"the adapter keeps its own copy of {replaced[0]}, which the base ties to its other end: a merge would "
            "untie them; leave embed_tokens and lm_head out of modules_to_save, or set ensure_weight_tying"
        )


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT may save of a live adapter: those that are trained, and frozen factors."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or ".lora_" in name
    }


@contextmanager
def saved_adapter(model: Any, weights: dict[str, torch.Tensor] | None = None) -> Iterator[Path]:
    """Yield a folder with the live model's active adapter, as PEFT saves it; it is removed on exit.

    Args:
        model: wrapped by PEFT, with one active adapter.
        weights: its gathered `adapter_state`, where the model is sharded.
    """
    [active] = model.active_adapters
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-adapter-") as folder:
        model.save_pretrained(folder, selected_adapters=[active], state_dict=weights)
        yield find_adapter(folder, active)


def refuse_resized(model: Any, base: Base) -> None:
    """Raise where the vocabulary was resized before the adapter was added: the rows that are new lie in no folder.

    Raises:
        UnsupportedError: saying what to save.
    """
    embeddings = base_model(model).get_input_embeddings().weight
    vocabulary = getattr(embeddings, "ds_shape", embeddings.shape)[0]  # ZeRO-3 leaves a parameter empty
    stored = base.vocabulary
    if stored is not None and stored != vocabulary:
        raise UnsupportedError(
            f"the vocabulary was resized from {stored} to {vocabulary} before the adapter was added; save the resized "
            "base, and pass its folder as base="
        )
