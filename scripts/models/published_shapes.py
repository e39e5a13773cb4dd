"""Tensor names and shapes of published models, and folders with real headers over sparse files.

What the doctor reads of weights is their headers alone, so a folder of 147 GB costs a few hundred kilobytes of disk.
Names and shapes are those that the makers publish (Qwen2.5-VL, Llama, LLaVA, Gemma 3); dimensions come from each
folder's own config.json.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]


def decoder(
    config: dict[str, Any], prefix: str, *, biases: bool = False, qk_norms: bool = False, gemma: bool = False
) -> Shapes:
    """Return a decoder of the Llama kind: embedding, layers, final norm."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        here = f"{prefix}layers.{layer}."
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{here}self_attn.{name}.weight"] = (rows, hidden)
            if biases:
                shapes[f"{here}self_attn.{name}.bias"] = (rows,)
        shapes[f"{here}self_attn.o_proj.weight"] = (hidden, queries)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{here}mlp.{name}.weight"] = (inner, hidden)
        shapes[f"{here}mlp.down_proj.weight"] = (hidden, inner)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
        shapes |= {f"{here}{name}.weight": (hidden,) for name in norms}
        if qk_norms:
            shapes |= {f"{here}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return shapes | {f"{prefix}norm.weight": (hidden,)}


def qwen2_5_vl(config: dict[str, Any]) -> Shapes:
    vision = config["vision_config"]
    hidden, inner, merged = vision["hidden_size"], vision["intermediate_size"], vision["hidden_size"] * 4
    shapes = decoder(config, "model.", biases=True)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    shapes["visual.patch_embed.proj.weight"] = (hidden, 3, 2, 14, 14)
    for block in range(vision["depth"]):
        here = f"visual.blocks.{block}."
        shapes |= {f"{here}norm1.weight": (hidden,), f"{here}norm2.weight": (hidden,)}
        shapes |= {f"{here}attn.qkv.weight": (3 * hidden, hidden), f"{here}attn.qkv.bias": (3 * hidden,)}
        shapes |= {f"{here}attn.proj.weight": (hidden, hidden), f"{here}attn.proj.bias": (hidden,)}
        for name, out, into in (
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            shapes |= {f"{here}mlp.{name}.weight": (out, into), f"{here}mlp.{name}.bias": (out,)}
    shapes["visual.merger.ln_q.weight"] = (hidden,)
    for name, rows in (("0", merged), ("2", vision["out_hidden_size"])):
        shapes |= {f"visual.merger.mlp.{name}.weight": (rows, merged), f"visual.merger.mlp.{name}.bias": (rows,)}
    return shapes


def qwen2_vl(config: dict[str, Any]) -> Shapes:
    size = config["vision_config"]["embed_dim"]
    tower: Shapes = {"visual.patch_embed.proj.weight": (size, 3, 2, 14, 14), "visual.merger.ln_q.weight": (size,)}
    for block in range(config["vision_config"]["depth"]):
        tower[f"visual.blocks.{block}.attn.qkv.weight"] = (3 * size, size)
        tower[f"visual.blocks.{block}.mlp.fc1.weight"] = (4 * size, size)
    return decoder(config, "model.", biases=True) | tower


def qwen3_vl(config: dict[str, Any]) -> Shapes:
    vision = config["vision_config"]
    tower: Shapes = {"model.visual.patch_embed.proj.weight": (vision["hidden_size"], 3, 2, 16, 16)}
    for block in range(vision["depth"]):
        tower[f"model.visual.blocks.{block}.attn.qkv.weight"] = (3 * vision["hidden_size"], vision["hidden_size"])
    return decoder(config["text_config"], "model.language_model.", qk_norms=True) | tower


def llama(config: dict[str, Any]) -> Shapes:
    return decoder(config, "model.")


def llava(config: dict[str, Any]) -> Shapes:
    # Only what differs from the defaults of a 7B Llama stands in the published text_config.
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    text = sizes | {"num_hidden_layers": 32} | config["text_config"]
    shapes = decoder(text, "language_model.model.")
    shapes["language_model.lm_head.weight"] = (text["vocab_size"], text["hidden_size"])
    shapes["multi_modal_projector.linear_1.weight"] = (4096, 1024)
    for layer in range(24):
        shapes[f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.q_proj.weight"] = (1024, 1024)
    return shapes


def gemma3(config: dict[str, Any]) -> Shapes:
    text = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    shapes = decoder(text | config["text_config"], "language_model.model.", qk_norms=True, gemma=True)
    for layer in range(27):
        shapes[f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.q_proj.weight"] = (1152, 1152)
    return shapes


def gemma2(config: dict[str, Any]) -> Shapes:
    return decoder(config, "model.", gemma=True)


SHAPES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "llama": llama,
    "llava": llava,
    "gemma3": gemma3,
    "gemma2": gemma2,
}


def write_weights(folder: Path, shapes: Shapes, *, dtype: str = "BF16", shards: int = 1) -> None:
    """Write headers over sparse files, as one file or as shards with their index."""
    width = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    names = list(shapes)
    per_shard = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names[number * per_shard : (number + 1) * per_shard]:
            begin, end = end, end + width * math.prod(shapes[name])
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [begin, end]}
            weight_map[name] = file
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + end)
        total += end
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
