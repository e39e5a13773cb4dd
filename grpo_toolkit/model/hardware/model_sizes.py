"""The cost of a model by its shape: bytes that a decode step reads, FLOPs of the prefill and the vision tower.

Read from `config.json` and tensor shapes, of a live model or of safetensors headers alike.

    bytes of a decode step = weights of the language model, each once + KV cache of every sequence
    KV cache of a token    = 2 x layers x KV heads x head dim x bytes of the dtype
    FLOPs of a linear layer = 2 x parameters x tokens;  of attention = 4 x width x (pairs of tokens)

(Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Pope et al. 2022, arXiv:2211.05102, for decoding being bound by
reading weights and KV cache.)
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.cache_probe import VISION_TOWERS
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings")
_HEADS: Final = ("lm_head", "embed_out")
_PROJECTORS: Final = ("merger", "multi_modal_projector")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model's shape, as far as its cost goes.

    Attributes:
        parameters: all of them, tied ones once.
        weights_bytes: what they take.
        decode_bytes: weights that every decode step reads: the language model and its head, not the vision tower, and
            of an untied embedding only a row.
        decode_parameters: the same as a count; what every token of the prefill is multiplied with, save the head.
        head_parameters: of the output head, which the prefill runs for the last token alone.
        layers, heads, kv_heads, head_dim: of the language model.
        element_bytes: of one value of the KV cache.
        vision_parameters, projector_parameters: of the tower's blocks, and of what maps patches to tokens.
        vision_layers, vision_width: of the tower.
        vision_window: patches in an attention window, None for full attention; `vision_full_layers` have none.
        merge: patches that become one image token.
    """

    parameters: int
    weights_bytes: int
    decode_bytes: int
    decode_parameters: int
    head_parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    vision_parameters: int = 0
    projector_parameters: int = 0
    vision_layers: int = 0
    vision_width: int = 0
    vision_window: int | None = None
    vision_full_layers: int = 0
    merge: int = 1

    @property
    def kv_bytes_per_token(self) -> int:
        """The bytes for one sequence: 2 (keys and values) x layers x KV heads x head dim x bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    def step_bytes(self, *, tokens: float, batch_size: int = 1) -> int:
        """Return the bytes that a decode step reads where each sequence has so many tokens before it."""
        return self.decode_bytes + round(self.kv_bytes_per_token * tokens * batch_size)

    def prefill_flops(self, tokens: int, *, batch_size: int = 1) -> float:
        """Return the FLOPs of the language model's first forward.

        They are those of linear layers, causal attention (half of all pairs) and one row of logits.
        """
        linear = 2 * (self.decode_parameters - self.head_parameters) * tokens
        attention = 4 * self.layers * self.heads * self.head_dim * tokens * (tokens + 1) / 2
        return float(batch_size * (linear + attention + 2 * self.head_parameters))

    def vision_flops(self, patches: int) -> float:
        """Return the FLOPs of the vision tower over so many patches of one image."""
        linear = 2 * self.vision_parameters * patches + 2 * self.projector_parameters * patches / self.merge
        windowed = self.vision_layers - self.vision_full_layers if self.vision_window else 0
        seen = windowed * min(self.vision_window or patches, patches) + (self.vision_layers - windowed) * patches
        return float(linear + 4 * self.vision_width * patches * seen)


def sizes_of(config: Mapping[str, Any], tensors: Mapping[str, tuple[Sequence[int], int]]) -> ModelSizes | None:
    """Return the sizes of a model.

    Args:
        config: `config.json`, or a live config's `to_dict()`.
        tensors: shape and bytes of every tensor by name, tied ones once.

    Returns:
        The sizes; None for a config that does not say how many layers and heads there are.
    """
    text = _text_config(config)
    layers, heads = (
        text.get("num_hidden_layers", text.get("n_layer")),
        text.get("num_attention_heads", text.get("n_head")),
    )
    width = text.get("hidden_size", text.get("n_embd"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int) and tensors):
        return None
    counts, sizes = Counter[str](), Counter[str]()
    for name, (shape, size) in tensors.items():
        part = _part(name)
        counts[part] += math.prod(shape)
        sizes[part] += size
    head = "head" if counts["head"] else "embedding"  # tied: the embedding is read whole, as the head
    weights, parameters = sizes["language"] + sizes[head], counts["language"] + counts[head]
    tower = config.get("vision_config")
    tower = tower if isinstance(tower, dict) else {}
    return ModelSizes(
        parameters=counts.total(),
        weights_bytes=sizes.total(),
        decode_bytes=weights,
        decode_parameters=parameters,
        head_parameters=counts[head],
        layers=layers,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or width // heads,
        element_bytes=round(weights / parameters) if parameters else 2,
        vision_parameters=counts["vision"],
        projector_parameters=counts["projector"],
        **_vision(tower),
    )


def live_sizes(model: torch.nn.Module) -> ModelSizes | None:
    """Return the sizes of a live model, adapters included."""
    tensors = {name: (tuple(p.shape), p.numel() * p.element_size()) for name, p in model.named_parameters()}
    return sizes_of(base_model(model).config.to_dict(), tensors)


def _part(name: str) -> str:
    words = set(name.split("."))
    parts = {"projector": _PROJECTORS, "vision": VISION_TOWERS, "head": _HEADS, "embedding": _EMBEDDINGS}
    return next((part for part, names in parts.items() if words & set(names)), "language")


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict) and "num_hidden_layers" in nested:
            return nested
    return config


def _vision(tower: Mapping[str, Any]) -> dict[str, Any]:
    layers = tower.get("depth", tower.get("num_hidden_layers", 0))
    window, patch = tower.get("window_size"), tower.get("patch_size")
    return {
        "vision_layers": layers,
        "vision_width": tower.get("embed_dim") or tower.get("hidden_size", 0),
        "vision_window": (window // patch) ** 2 if window and patch else None,
        "vision_full_layers": len(tower.get("fullatt_block_indexes") or []),
        "merge": tower.get("spatial_merge_size", 1) ** 2,
    }
