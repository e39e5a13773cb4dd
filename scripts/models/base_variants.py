"""Bases as their makers publish them, made of those that the library of the day has saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

WEIGHTS = "model.safetensors"
TEXT_SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def build_text_base(family: str, folder: Path, **options: Any) -> Path:
    """Build a text model from its config class, with a tokenizer of bytes; skip where transformers has none."""
    import transformers

    from scripts.models.tiny_bases import byte_tokenizer

    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    tokenizer = byte_tokenizer()
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{family}Config")(**{**TEXT_SIZES, **tokens, "initializer_range": 0.3, **options})
    torch.manual_seed(0)
    getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
    """Replace a folder's tensors by what `change` makes of them."""
    changed = {name: tensor.clone().contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def change_json(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Let `change` edit a JSON file of a folder."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content, indent=2))
    return folder


def with_second_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with the tied head stored as well, as Qwen3-1.7B is published."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def with_extras(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with tensors that no class holds: a layer too many, MTP heads, old frequencies."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = {name.replace("layers.1.", "layers.2."): t + 0.5 for name, t in weights.items() if "layers.1." in name}
    heads = {
        "mtp.fc.weight": noise(32, 64),
        "mtp.layers.0.self_attn.q_proj.weight": noise(32, 32),
        "mtp.norm.weight": noise(32),
    }
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": noise(8) for layer in range(2)}
    return {**weights, **layers, **heads, **frequencies}


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VLMS: dict[str, dict[str, Any]] = {
    "Gemma3": {"text": {"model_type": "gemma3_text"}, "vision": SIGLIP, "mm_tokens_per_image": 4},
    "PaliGemma": {"text": {"model_type": "gemma"}, "vision": SIGLIP, "projection_dim": 32},
    "Mistral3": {
        "text": {"model_type": "mistral"},
        "vision": {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        "spatial_merge_size": 1,
    },
    "Qwen3_5": {"text": HYBRID, "vision": QWEN_VISION},
    "Qwen3VLMoe": {
        "text": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        "vision": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "Gemma4": {
        "text": {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0},
        "vision": {**SIGLIP, "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8, "patch_size": 16},
    },
}
_SPECIAL = {
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "vision_bos_token": "<vs>",
    "vision_eos_token": "<ve>",
}


def build_vlm(family: str, folder: Path, **options: Any) -> Path:
    """Build a vision-language base from its config class, with its processor; skip where transformers has none."""
    import transformers

    from scripts.models.tiny_bases import byte_tokenizer

    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    settings = dict(VLMS[family])
    tokenizer = byte_tokenizer(extra=list(_SPECIAL.values()))
    tokenizer.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=_SPECIAL)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**TEXT_SIZES, **tokens, "vocab_size": len(tokenizer), "initializer_range": 0.3, **settings.pop("text")}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=settings.pop("vision"),
        image_token_id=image,
        image_token_index=image,
        **settings,
        **tokens,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    _processor(family, tokenizer).save_pretrained(folder)
    return folder


def _processor(family: str, tokenizer: Any) -> Any:
    import transformers as tf

    from scripts.models.tiny_bases import LLAVA_TEMPLATE

    square = {"height": 28, "width": 28}
    if family == "Gemma3":
        images = tf.Gemma3ImageProcessor(size=square)
        template = LLAVA_TEMPLATE.replace("<image>", "<boi>")
        return tf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)
    if family == "PaliGemma":
        images = tf.SiglipImageProcessor(size=square)
        images.image_seq_length = 4
        return tf.PaliGemmaProcessor(images, tokenizer)
    if family == "Mistral3":
        images = tf.PixtralImageProcessor(size={"longest_edge": 28}, patch_size=14)
        return tf.PixtralProcessor(images, tokenizer, patch_size=14, image_token="<image>")
    if family == "Gemma4":
        from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

        return tf.Gemma4Processor(
            tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(), tokenizer, Gemma4VideoProcessor()
        )
    return tf.Qwen3VLProcessor(tf.Qwen2VLImageProcessor(patch_size=16), tokenizer, tf.Qwen3VLVideoProcessor())


def with_inner_vision_model(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of makers, whose vision tower has a `vision_model` inside."""
    parts = ("embeddings.", "encoder.", "post_layernorm.", "pre_layrnorm.", "head.")

    def name_of(name: str) -> str:
        tail = name.removeprefix("vision_tower.")
        return f"vision_tower.vision_model.{tail}" if tail != name and tail.startswith(parts) else name

    return {name_of(name): tensor for name, tensor in weights.items()}
