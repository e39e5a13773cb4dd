"""The names under which vLLM finds Qwen2.5-VL's weights in a folder, as data.

Source: https://github.com/vllm-project/vllm/blob/fb33ec8cf0a73c82af00a2128dee4ad058d16e9b/vllm/model_executor/models/
qwen2_5_vl.py (`hf_to_vllm_mapper`, `stacked_params_mapping`, the modules of `Qwen2_5_VisionTransformer`) and qwen2.py
beside it (`Qwen2Model.load_weights`).
"""

from __future__ import annotations

VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
"""Each is tried in turn on what the one before left."""

VLLM_PREFIXES_OF_OLD = {"lm_head.": "language_model.lm_head.", "model.": "language_model.model."}
"""Those "for original checkpoint": all that releases before the names of transformers 4.52 know."""

VLLM_STACKED = (
    (".qkv_proj.", ".q_proj.", "q"),
    (".qkv_proj.", ".k_proj.", "k"),
    (".qkv_proj.", ".v_proj.", "v"),
    (".gate_up_proj.", ".gate_proj.", "gate"),
    (".gate_up_proj.", ".up_proj.", "up"),
)
"""A parameter, the part of a stored name that leads to it, and which piece of the parameter that is."""

_QKV, _GATE_UP, _WHOLE = ("q", "k", "v"), ("gate", "up"), ("whole",)
_BLOCK, _LAYER = "visual.blocks.N.", "language_model.model.layers.N."

VLLM_PARAMETERS = {
    "visual.patch_embed.proj.weight": _WHOLE,
    f"{_BLOCK}norm1.weight": _WHOLE,
    f"{_BLOCK}norm2.weight": _WHOLE,
    f"{_BLOCK}attn.qkv.weight": _WHOLE,
    f"{_BLOCK}attn.qkv.bias": _WHOLE,
    f"{_BLOCK}attn.proj.weight": _WHOLE,
    f"{_BLOCK}attn.proj.bias": _WHOLE,
    f"{_BLOCK}mlp.gate_up_proj.weight": _GATE_UP,
    f"{_BLOCK}mlp.gate_up_proj.bias": _GATE_UP,
    f"{_BLOCK}mlp.down_proj.weight": _WHOLE,
    f"{_BLOCK}mlp.down_proj.bias": _WHOLE,
    "visual.merger.ln_q.weight": _WHOLE,
    "visual.merger.mlp.0.weight": _WHOLE,
    "visual.merger.mlp.0.bias": _WHOLE,
    "visual.merger.mlp.2.weight": _WHOLE,
    "visual.merger.mlp.2.bias": _WHOLE,
    "language_model.model.embed_tokens.weight": _WHOLE,
    f"{_LAYER}input_layernorm.weight": _WHOLE,
    f"{_LAYER}self_attn.qkv_proj.weight": _QKV,
    f"{_LAYER}self_attn.qkv_proj.bias": _QKV,
    f"{_LAYER}self_attn.o_proj.weight": _WHOLE,
    f"{_LAYER}post_attention_layernorm.weight": _WHOLE,
    f"{_LAYER}mlp.gate_up_proj.weight": _GATE_UP,
    f"{_LAYER}mlp.down_proj.weight": _WHOLE,
    "language_model.model.norm.weight": _WHOLE,
    "language_model.lm_head.weight": _WHOLE,
}
"""Every parameter with the pieces that it is loaded from; `N` stands for a layer. A tied head is none."""
