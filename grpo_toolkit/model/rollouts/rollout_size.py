"""The memory that fast rollouts keep, told from a model's sizes: of a live one, or of one that is only planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts import static_caches
from grpo_toolkit.model.rollouts.supported import why_unsupported
from grpo_toolkit.model.sharding.gather import is_sharded, own_part, whole_shape

if TYPE_CHECKING:
    import torch

PROMPT: Final = 1024
"""Tokens of a prompt, for want of knowing: what is counted in a cache before the first rollout."""

_TRAINED: Final = 3
"""The tensors that a training holds beside each trained one: its gradient, and Adam's two moments."""

_GRAPHS: Final = 1_000_000_000
"""Bytes for what CUDA graphs and a compiled step's kernels keep."""


@dataclass(frozen=True, kw_only=True)
class RolloutSize:
    """The sizes of a model that say what `FastRolloutCallback` keeps through a training.

    Attributes:
        parameters: of the model without an adapter.
        folded: of the layers that an adapter is folded into.
        kv_values_per_token: keys and values of all layers.
        why_plain: the reason why its rollouts cannot go the fast way, in a few words; None where they can.
    """

    parameters: int
    folded: int = 0
    kv_values_per_token: int
    why_plain: str | None = None

    def copied_bytes(
        self, *, weight_bytes: float, computed_bytes: float | None = None, gathered: bool = False
    ) -> float:
        """Return about what the copy of the weights takes: those that are cast or gathered, or have an adapter.

        Args:
            weight_bytes: of a weight of the live model.
            computed_bytes: of a weight as it is computed with; None where nothing is cast.
            gathered: whether the weights are sharded over processes.
        """
        if computed_bytes is not None and computed_bytes < weight_bytes:
            return computed_bytes * self.parameters
        return weight_bytes * (self.parameters if gathered else self.folded)

    def kept_bytes(
        self,
        *,
        rows: int,
        tokens: int,
        weight_bytes: float,
        computed_bytes: float | None = None,
        gathered: bool = False,
    ) -> float:
        """Return about what one process keeps: the copy of the weights, a static KV cache and CUDA graphs.

        Args:
            rows: sequences in a rollout of this process.
            tokens: of a prompt and its completion at most.
            weight_bytes: as for `copied_bytes`.
            computed_bytes: as for `copied_bytes`.
            gathered: as for `copied_bytes`.
        """
        copied = self.copied_bytes(weight_bytes=weight_bytes, computed_bytes=computed_bytes, gathered=gathered)
        value_bytes = min(weight_bytes, computed_bytes or weight_bytes)
        slots = rows * static_caches.bucketed(tokens)
        return copied + self.kv_values_per_token * value_bytes * slots + _GRAPHS


def rollout_size(model: torch.nn.Module) -> RolloutSize:
    """Return the sizes of a model, with or without an adapter.

    Args:
        model: a live one, or one without memory, built under `torch.device("meta")`.
    """
    inner: Any = base_model(model)
    text = inner.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    counts = {
        name: whole_shape(parameter).numel()
        for name, parameter in inner.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name  # which stand for what the base has
    }
    return RolloutSize(
        parameters=sum(counts.values()),
        folded=sum(count for name, count in counts.items() if name.endswith(".base_layer.weight")),
        kv_values_per_token=2 * text.num_hidden_layers * heads * dim,
        why_plain=why_unsupported(model),
    )


def needed_bytes(
    model: torch.nn.Module, dtype: torch.dtype | None, *, rows: int, new_tokens: int, shared_by: int = 1
) -> int:
    """Return about what fast rollouts take of this process's GPU before a training, with what that will take.

    Args:
        model: the live one.
        dtype: what float32 weights are computed in under autocast; None where there is none.
        rows: sequences in a rollout of this process.
        new_tokens: of a completion at most.
        shared_by: processes that share out gradients and optimizer states of weights that all of them hold (ZeRO-2).
    """
    kept = rollout_size(model).kept_bytes(
        rows=rows,
        tokens=PROMPT + new_tokens,
        weight_bytes=base_model(model).dtype.itemsize,
        computed_bytes=None if dtype is None else dtype.itemsize,
        gathered=is_sharded(model),
    )
    parts = (own_part(parameter) for parameter in model.parameters() if parameter.requires_grad)
    trained: int = sum(part.numel() * part.element_size() for part in parts)
    return int(kept) + _TRAINED * trained // shared_by
