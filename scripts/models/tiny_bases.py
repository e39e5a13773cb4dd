"""Tiny bases with random weights, from their config classes: Qwen2.5-VL as published, LLaVA, Llama and Qwen3-MoE."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_TOKEN = "<image>"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_qwen2_5_vl(folder: Path, *, dtype: str = "float32", head_dim: int = 8) -> Path:
    """Build a base as it lies on the Hub: flat config.json, published names, generation defaults."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from scripts.models.tiny_vlm_files import TinyRecipe, write_hub_files

    folder.mkdir(parents=True)
    recipe = TinyRecipe(
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(head_dim // 4, head_dim // 8, head_dim // 8),
        vision_depth=2,
        vision_hidden_size=32,
        vision_intermediate_size=32,
        vision_num_heads=2,
        fullatt_block_indexes=(1,),
        # Wide enough apart that greedy decoding has no ties.
        initializer_range=0.3,
    )
    write_hub_files(folder, recipe=recipe, corpus=["What is this? What is number 1?"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    _save_weights_only(model.to(getattr(torch, dtype)), folder)
    return folder


def build_llama(folder: Path, *, dtype: str = "float32") -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build_text(folder, LlamaForCausalLM, LlamaConfig, dtype=dtype)


def build_qwen3_moe(folder: Path, *, dtype: str = "float32") -> Path:
    """Build a mixture of experts: stacked in transformers 5, published one by one; its first layer is dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
    return _build_text(folder, Qwen3MoeForCausalLM, Qwen3MoeConfig, dtype=dtype, head_dim=16, **experts)


def _build_text(folder: Path, model_class: Any, config_class: Any, *, dtype: str, **options: Any) -> Path:
    import torch
    from transformers import GenerationConfig

    tokenizer = byte_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    torch.manual_seed(0)
    model = model_class(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=config.eos_token_id, bos_token_id=config.bos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_llava(folder: Path) -> Path:
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = byte_tokenizer(extra=[IMAGE_TOKEN])
    image_size, patch_size = 28, 14
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def byte_tokenizer(extra: list[str] | None = None) -> Any:
    """Return a tokenizer that needs no training: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=extra or [],
        chat_template=LLAVA_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def _save_weights_only(model: Any, folder: Path) -> None:
    """Save the weights under the names that the library publishes; the JSON files stand already."""
    import shutil

    saved = folder.with_name(folder.name + ".saved")
    model.save_pretrained(saved)
    shutil.copyfile(saved / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(saved)
