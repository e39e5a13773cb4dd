"""The attention forward of Qwen2-VL's and Qwen2.5-VL's towers in transformers 4.49 to 4.57, over packed segments.

These releases ask for "flash_attention_2" by name, so no registered attention can take its place. Up to 4.52 they
build a dense boolean mask over all patches of all images and attend quadratically; 4.53 builds it once a forward; from
4.54 on they call SDPA once a segment. Their releases are finished, so the parts that this forward is put together
from (`qkv`, `proj`, `num_heads`, the module's rotary function) stay as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.segment_attention import packed_attention
from grpo_toolkit.model.attention.vision_towers import library_module

if TYPE_CHECKING:
    import torch


def packed_forward(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rotary_pos_emb: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> torch.Tensor:
    """Attend within each segment: hidden states [rows, dim] in and out."""
    import torch

    rows = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(rows, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    if position_embeddings is None:
        assert rotary_pos_emb is not None
        angles = torch.cat((rotary_pos_emb, rotary_pos_emb), dim=-1).float()
        position_embeddings = angles.cos(), angles.sin()
    query, key = library_module(self).apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out, _weights = packed_attention(
        self,
        query,
        key,
        value,
        None,
        dropout=getattr(self, "attention_dropout", 0.0) if self.training else 0.0,
        scaling=query.shape[-1] ** -0.5,
        is_causal=False,
        cu_seq_lens_q=cu_seqlens,
    )
    projected: torch.Tensor = self.proj(out.reshape(rows, -1))
    return projected


def install(layer: torch.nn.Module) -> None:
    """Put the packed forward on one layer; a copy of the layer carries it on, as its own method."""
    layer.forward = MethodType(packed_forward, layer)


def uninstall(layer: torch.nn.Module) -> None:
    """Give the layer its class's forward back."""
    vars(layer).pop("forward", None)
