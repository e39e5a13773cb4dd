"""A LoRA adapter merged into a fresh copy of its base, by PEFT; the live model is left as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cache import base_model
from grpo_toolkit.checkpoint import open_checkpoint
from grpo_toolkit.errors import UnsupportedError, VerificationError
from grpo_toolkit.inference import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def refuse_unmergeable(model: Any) -> None:
    """Raise for adapters whose merge would not be what was trained.

    Raises:
        UnsupportedError: not exactly one adapter is active, or it replaces embeddings that the base ties to its head.
    """
    if not is_adapted(model):
        return
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UnsupportedError(f"{len(active)} adapters are active ({', '.join(active)}); activate the one to export")
    embeddings = [(n, m) for n, m in model.named_modules() if n.endswith(("embed_tokens", "lm_head"))]
    replaced = [name for name, module in embeddings if hasattr(module, "modules_to_save")]
    if replaced and any(getattr(level, "tie_word_embeddings", False) for level in _config_and_text(model)):
        raise UnsupportedError(
            f"the adapter keeps its own copy of {replaced[0]}, which the base ties to its other end: a merge would "
            "untie them; leave embed_tokens and lm_head out of modules_to_save"
        )


def _config_and_text(model: Any) -> list[Any]:
    config = base_model(model).config
    return [config, config.get_text_config()]


def merged_copy(model: Any, base: Path | None) -> PreTrainedModel:
    """Load the base from disk in float32 and merge the live model's active adapter into it.

    Raises:
        UnsupportedError: the base is not a folder on this machine.
    """
    from peft import PeftModel

    if base is None:
        name = getattr(base_model(model).config, "_name_or_path", None)
        raise UnsupportedError(
            f"an adapter is merged into its base from disk, and the base {name!r} is no folder here; pass base="
        )
    [active] = model.active_adapters
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-adapter-") as folder:
        model.save_pretrained(folder, selected_adapters=[active])
        fresh, _, _ = load_model(base)
        vocabulary = base_model(model).get_input_embeddings().weight.shape[0]
        if fresh.get_input_embeddings().weight.shape[0] != vocabulary:
            raise UnsupportedError(
                f"the vocabulary was resized to {vocabulary} before the adapter was added; save the resized base, and "
                "pass its folder as base="
            )
        # PEFT saves an adapter that is not called "default" in a folder of its name.
        saved = Path(folder) if active == "default" else Path(folder, active)
        merged: PreTrainedModel = PeftModel.from_pretrained(fresh.float(), saved).merge_and_unload(safe_merge=True)
    return merged


def refuse_idle_merge(model: torch.nn.Module, merged: Path, base: Path | None) -> None:
    """Raise if a merge changed nothing though the adapter says something: it did not reach its modules.

    Raises:
        VerificationError: every tensor of the merged folder equals the base's.
    """
    from safetensors import safe_open

    if base is None or not is_adapted(model) or _is_zero(model):
        return
    before, after = open_checkpoint(base).tensors(), open_checkpoint(merged).tensors()
    for name in after.keys() & before.keys():
        with safe_open(merged / after[name].file, "pt") as ours, safe_open(base / before[name].file, "pt") as theirs:
            if not ours.get_tensor(name).equal(theirs.get_tensor(name)):
                return
    if after.keys() & before.keys():
        raise VerificationError(f"not published: merging the adapter changed no tensor of {base}")


def _is_zero(model: Any) -> bool:
    """Whether the adapter adds nothing: LoRA's second factor starts at zero, and a run without reward leaves it."""
    from peft import get_peft_model_state_dict

    [active] = model.active_adapters
    adapter = get_peft_model_state_dict(model, adapter_name=active)
    second = [tensor for name, tensor in adapter.items() if "lora_B" in name]
    return bool(second) and not any(tensor.any() for tensor in second)
