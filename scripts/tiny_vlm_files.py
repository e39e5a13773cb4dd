"""The files of a published Qwen2.5-VL folder, all but the weights, at a tiny recipe's sizes.

They are written by hand and not by `save_pretrained`, because what a library of today saves is not what Qwen
published: the folder has the flat `config.json`, `preprocessor_config.json`, `chat_template.json`, and the
tokenizer's four files of the 4.x libraries, which every later version reads as well.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from make_tiny_vlm import TinyRecipe

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""As published, in the published order, after the byte-level vocabulary."""

ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""The published tokens that are whole but not special: decoding with `skip_special_tokens` keeps them."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The published Qwen2.5-VL template."""


def write_hub_files(folder: Path, *, recipe: TinyRecipe, corpus: list[str]) -> None:
    """Write every file of the folder but the weights, in the form in which Qwen2.5-VL is published.

    Args:
        folder (`Path`):
            An existing folder.
        recipe (`TinyRecipe`):
            The sizes.
        corpus (`list[str]`):
            The texts on which the tokenizer is trained. Any other text falls back to bytes.
    """
    token_ids = _write_tokenizer(folder, vocab_size=recipe.bpe_vocab_size, corpus=corpus)
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    vocab_size = -(-len(token_ids) // 64) * 64  # Rounded up for the hardware, as the published one is.
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "vision_start_token_id": token_ids["<|vision_start|>"],
            "vision_end_token_id": token_ids["<|vision_end|>"],
            "vision_token_id": token_ids["<|vision_pad|>"],
            "image_token_id": token_ids["<|image_pad|>"],
            "video_token_id": token_ids["<|video_pad|>"],
            "hidden_act": "silu",
            "hidden_size": recipe.hidden_size,
            "initializer_range": recipe.initializer_range,
            "intermediate_size": recipe.intermediate_size,
            "max_position_embeddings": 32768,
            "max_window_layers": recipe.num_layers,
            "num_attention_heads": recipe.num_heads,
            "num_hidden_layers": recipe.num_layers,
            "num_key_value_heads": recipe.num_kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "mrope", "mrope_section": list(recipe.mrope_section)},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_sliding_window": False,
            "vision_config": {
                "depth": recipe.vision_depth,
                "hidden_act": "silu",
                "hidden_size": recipe.vision_hidden_size,
                "intermediate_size": recipe.vision_intermediate_size,
                "num_heads": recipe.vision_num_heads,
                "in_channels": 3,
                "out_hidden_size": recipe.hidden_size,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "initializer_range": recipe.initializer_range,
                "window_size": recipe.window_size,
                "fullatt_block_indexes": list(recipe.fullatt_block_indexes),
            },
            "vocab_size": vocab_size,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "pad_token_id": end_of_text,
            "do_sample": True,
            "eos_token_id": [end_of_turn, end_of_text],
            "repetition_penalty": 1.05,
            "temperature": 1e-06,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _write_tokenizer(folder: Path, *, vocab_size: int, corpus: list[str]) -> dict[str, int]:
    """Train a byte-level BPE, write its four files, and return every token's id."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))

    token_ids = tokenizer.get_vocab()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token_ids[token]): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
                for token in SPECIAL_TOKENS + ADDED_TOKENS
            },
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5_VLProcessor",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return token_ids


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as the Hub's folders have it: indented, UTF-8, with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
