"""The files of a published Qwen2.5-VL folder, all but the weights, at any sizes.

They are written by hand and not by `save_pretrained`, because what a library of today saves is not what Qwen
published: the folder has the flat `config.json`, `preprocessor_config.json`, `chat_template.json`, and the
tokenizer's four files of the 4.x libraries, which every later version reads as well.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen2.5-VL, under the names of its published config where those are clear by themselves."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mrope_section: tuple[int, ...] = (16, 24, 24)  # Sums to half of head_dim.
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = "float32"
    vision_depth: int = 32
    vision_hidden_size: int = 1280
    vision_intermediate_size: int = 3420
    vision_num_heads: int = 16
    window_size: int = 112  # Pixels.
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)


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
    token_ids = write_tokenizer(folder, _trained_tokenizer(corpus, vocab_size=recipe.bpe_vocab_size))
    vocab_size = -(-len(token_ids) // 64) * 64  # Rounded up for the hardware, as the published one is.
    write_model_files(folder, shape=recipe, token_ids=token_ids, vocab_size=vocab_size)


def write_model_files(folder: Path, *, shape: Shape, token_ids: dict[str, int], vocab_size: int) -> None:
    """Write the configs of model, generation and image processor, and the chat template.

    Args:
        folder (`Path`):
            An existing folder.
        shape (`Shape`):
            The sizes.
        token_ids (`dict[str, int]`):
            Ids of the special tokens at least, as `write_tokenizer` returns them.
        vocab_size (`int`):
            Rows of the embedding; more than the tokenizer has tokens.
    """
    end_of_text, end_of_turn = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
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
            "hidden_size": shape.hidden_size,
            "initializer_range": shape.initializer_range,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_position_embeddings,
            "max_window_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_hidden_layers": shape.num_layers,
            "num_key_value_heads": shape.num_kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": shape.tie_word_embeddings,
            "torch_dtype": shape.dtype,
            "use_sliding_window": False,
            "vision_config": {
                "depth": shape.vision_depth,
                "hidden_act": "silu",
                "hidden_size": shape.vision_hidden_size,
                "intermediate_size": shape.vision_intermediate_size,
                "num_heads": shape.vision_num_heads,
                "in_channels": 3,
                "out_hidden_size": shape.hidden_size,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "initializer_range": shape.initializer_range,
                "window_size": shape.window_size,
                "fullatt_block_indexes": list(shape.fullatt_block_indexes),
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


def _trained_tokenizer(corpus: list[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that knows the corpus's words."""
    from tokenizers import models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = byte_level_tokenizer(models.BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level_tokenizer(model: Any) -> Tokenizer:
    """Put Qwen2's steps around a BPE model: normalisation, splitting into words, bytes, and back."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Add the published special tokens to a tokenizer, write its four files, and return every token's id."""
    from tokenizers import AddedToken

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyRecipe(Shape):
    """The shape and supervision of the tiny model; part of the cache key, so an edit here makes a new folder."""

    bpe_vocab_size: int = 384
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    mrope_section: tuple[int, ...] = (4, 6, 6)  # Sums to half of head_dim, in the published 16 : 24 : 24.
    initializer_range: float = 0.09  # The published 0.02 suits wide layers; narrow ones then start too quiet.
    vision_depth: int = 2
    vision_hidden_size: int = 128
    vision_intermediate_size: int = 256
    vision_num_heads: int = 4
    window_size: int = 56  # Pixels: an 84-pixel image has 3 x 3 image tokens, in windows of 4, 2, 2 and 1.
    fullatt_block_indexes: tuple[int, ...] = (1,)  # Block 0 is windowed, block 1 sees the whole image.

    seed: int = 0
    misread_rate: float = 0.65  # Over 0.5 the mistake is the first choice; under 1 GRPO can mend it.
    validation_rows: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    check_every: int = 10
    min_steps: int = 100  # Below, the format is not yet sure enough to be sampled at temperature 1.
    max_steps: int = 300
    wanted_accuracy: tuple[float, float] = (0.42, 0.58)
    wanted_agreement: float = 0.8
