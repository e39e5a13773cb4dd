"""A check that a resume loaded the checkpoint's weights, and their loading where it did not.

A full fine-tune of Qwen2.5-VL resumes from the *base*, silently: its checkpoints carry the published names
(`visual.*`, `model.layers.*`), the live model has others (`model.visual.*`, `model.language_model.*`), and
`Trainer._load_from_checkpoint` calls `load_state_dict(strict=False)`, which matches nothing and only warns. The same
happens to `load_best_model_at_end`. The library's own loader, `from_pretrained`, knows how to translate the names,
so that is what is asked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_WEIGHTS, Kind, open_checkpoint
from grpo_toolkit.checkpoint.folders.trainer_checkpoints import TRAINER_STATE
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.tensor_names import live_name
from grpo_toolkit.errors import CheckpointError, ResumeError
from grpo_toolkit.model.live_model import base_model, random_state_kept
from grpo_toolkit.model.load import dtype_argument

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import TrainerState


@dataclass(frozen=True, kw_only=True)
class ResumeReport:
    """The outcome of comparing live weights with a checkpoint's: how many tensors, and which differed."""

    checkpoint: Path
    compared: int
    restored: tuple[str, ...]

    def __str__(self) -> str:
        if not self.restored:
            return f"{self.checkpoint}: all {self.compared} tensors of the resumed model are the checkpoint's"
        return (
            f"{self.checkpoint}: {len(self.restored)} of {self.compared} tensors were not the checkpoint's "
            f"({self.restored[0]}, ...), because the trainer could not match their names; they are now"
        )


def ensure_checkpoint_weights(model: torch.nn.Module, checkpoint: Path) -> ResumeReport:
    """Make the live weights those of a checkpoint, in place, so that an optimizer goes on holding them.

    Args:
        model: the trainer's model, PEFT-wrapped or not; sharded models (FSDP, ZeRO-3) have loaders of their own.
        checkpoint: a `checkpoint-N` folder.

    Raises:
        ResumeError: the checkpoint does not have all the weights that the model needs.
        CheckpointError: it cannot be read, so nothing can be said.
    """
    with random_state_kept():
        if hasattr(model, "peft_config"):
            live, stored = _adapter_states(model, checkpoint)
        elif open_checkpoint(checkpoint).kind is Kind.ADAPTER:
            raise ResumeError(f"{checkpoint}: holds an adapter, but the model in training has none; pass peft_config")
        else:
            live, stored = _full_states(model, checkpoint)
    missing = sorted(live.keys() - stored.keys())
    if missing:
        raise ResumeError(
            f"{checkpoint}: lacks {len(missing)} of the model's {len(live)} tensors ({missing[0]}, ...), so training "
            "would go on from other weights; pass the checkpoint as `model` and resume from it, or start anew"
        )
    return ResumeReport(checkpoint=checkpoint, compared=len(live), restored=_copy_differing(live, stored))


def _copy_differing(live: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    import torch

    restored = []
    with torch.no_grad():
        for name, tensor in live.items():
            wanted = stored[name].to(device=tensor.device, dtype=tensor.dtype)
            if wanted.shape != tensor.shape:
                raise ResumeError(
                    f"{name}: {tuple(wanted.shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
                )
            if not torch.equal(wanted, tensor):
                tensor.copy_(wanted)
                restored.append(name)
    return tuple(restored)


def _full_states(model: torch.nn.Module, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    inner = base_model(model)
    loader: Any = type(inner)
    loaded, info = loader.from_pretrained(checkpoint, output_loading_info=True, **{dtype_argument(): inner.dtype})
    unloaded = set(info["missing_keys"])
    stored = {name: tensor for name, tensor in loaded.state_dict().items() if name not in unloaded}
    return inner.state_dict(), stored


def _adapter_states(model: Any, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    # PEFT's own save leaves the adapter's name out of the keys, in memory and on disk alike.
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    # An adapter that is not called "default" lies in a folder of its name.
    [active] = model.active_adapters
    paths = [checkpoint / ADAPTER_WEIGHTS, checkpoint / active / ADAPTER_WEIGHTS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CheckpointError(f"{checkpoint}: no {ADAPTER_WEIGHTS} in it to compare the resumed adapter with")
    live = get_peft_model_state_dict(model, adapter_name=active)
    # Since 4.52 the text model of a VLM is called otherwise, and an adapter with it: PEFT then loads nothing of it.
    family = family_of(getattr(base_model(model).config, "model_type", None))
    stored = {live_name(name, family): tensor for name, tensor in load_file(path).items()}
    return live, {name: stored[own] for name in live if (own := live_name(name, family)) in stored}


def is_checkpoint_of(checkpoint: Path, state: TrainerState) -> bool:
    """Return whether a folder is the checkpoint that a resumed trainer's state was read from.

    A trainer does not tell its callbacks which folder it resumes from, and another run's `checkpoint-N` of the same
    step may lie where it is looked for: so the state on disk has to be the live one, log and all.
    """
    path = checkpoint / TRAINER_STATE
    if not path.is_file():
        return False
    saved = read_json(path)
    return bool(saved.get("global_step") == state.global_step and saved.get("log_history") == state.log_history)
