"""Every rule on a literal folder: what it finds, at which place, with which value."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.generation_defaults import SAMPLING
from grpo_toolkit.checkpoint.tensor_names import plan_renames
from grpo_toolkit.doctor.diagnose import ALL_RULES, diagnose_folder
from grpo_toolkit.doctor.findings import Edit
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.parsed_folder import Digests
from grpo_toolkit.doctor.planned_files import Entry
from grpo_toolkit.doctor.rules.generation import NEUTRAL
from tests.support.memory_files import MemoryFiles, folder_of, put_tensors

if TYPE_CHECKING:
    from grpo_toolkit.doctor.findings import Finding

Json = dict[str, Any]

CONFIG: Json = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 8,
    "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GENERATION: Json = {"eos_token_id": 7}
TOKENS: Json = {"7": {"content": "</s>"}, "6": {"content": "<pad>"}}
TOKENIZER: Json = {"eos_token": "</s>", "added_tokens_decoder": TOKENS, "tokenizer_class": "LlamaTokenizer"}
BYTES: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDS: Json = {"added_tokens": [], "decoder": BYTES, "model": {"vocab": {"a": 0}}}
ADDED_ELSEWHERE: Json = {"eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
ROPE: Json = {"rope_theta": 10000.0, "rope_type": "default"}
STRETCHED: Json = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32}
TENSORS = {
    "model.embed_tokens.weight": ("BF16", (8, 4)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (4, 4)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (4, 4)),
    "model.norm.weight": ("BF16", (4,)),
    "lm_head.weight": ("BF16", (8, 4)),
}
LORA = {
    "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x/y", "peft_type": "LORA",
    "target_modules": ["up_proj", "qkv", "lm_head"],
}  # fmt: skip
FACTORS = {
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": ("F32", (2, 4)),
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": ("F32", (4, 2)),
}
VISION: Json = {"vision_config": {"depth": 1}}
IMAGES: Json = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 2}}
TEMPLATE: Json = {"chat_template": "{{ messages }}{# images #}"}


def model(tensors: Any = None, *, config: Any = None, drop: tuple[str, ...] = (), **files: Any) -> MemoryFiles:
    """A clean Llama folder with changes: `config` is merged into its config, None for a file removes it."""
    settings = {**CONFIG, **(config or {})}
    contents: Json = {
        "config.json": {key: settings[key] for key in settings if key not in drop},
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER, "tokenizer.json": WORDS,
    }  # fmt: skip
    for name, value in files.items():
        contents[name.replace("__", ".")] = value
    contents = {name: value for name, value in contents.items() if value is not None}
    return folder_of(contents, TENSORS if tensors is None else tensors)


def without(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: value for key, value in TENSORS.items() if key != name}


def strange(**entries: Entry) -> MemoryFiles:
    files = model()
    files.strange = {name.replace("__", "."): entry for name, entry in entries.items()}
    return files


def sharded(index: Any, **shards: Any) -> MemoryFiles:
    files = model({}, model__safetensors__index__json={"metadata": {}, **index})
    del files.contents["model.safetensors"]
    for name, tensors in shards.items():
        put_tensors(files, name.replace("__", "."), tensors)
    return files


def unindexed(**shards: Any) -> MemoryFiles:
    files = model({})
    del files.contents["model.safetensors"]
    for name, tensors in shards.items():
        put_tensors(files, f"{name.replace('__', '-')}.safetensors", tensors)
    return files


def beside(**shards: Any) -> MemoryFiles:
    files = model()
    for name, tensors in shards.items():
        put_tensors(files, f"{name.replace('__', '-')}.safetensors", tensors)
    return files


def adapter(factors: Any = None, **config: Any) -> MemoryFiles:
    return folder_of({"adapter_config.json": {**LORA, **config}}, FACTORS if factors is None else factors)


def cut() -> MemoryFiles:
    files = model()
    files.sizes["model.safetensors"] -= 1
    return files


def renamed(old: str, new: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name.replace(old, new, 1) if name.startswith(old) else name: info for name, info in TENSORS.items()}


BASE = model()
TIED = model(without("lm_head.weight"), config={"tie_word_embeddings": True})
VLM_BASE = model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE)
QWEN: Json = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
SPLIT = {"one__safetensors": without("lm_head.weight"), "two__safetensors": {"lm_head.weight": ("BF16", (8, 4))}}
MAP = {**dict.fromkeys(without("lm_head.weight"), "one.safetensors"), "lm_head.weight": "two.safetensors"}
Q_LORA = {
    "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight": ("F32", (2, 4)),
    "base_model.model.visual.blocks.0.attn.qkv.lora_B.weight": ("F32", (4, 2)),
}
FP8_GROUP: Json = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
IN_FP8: Json = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": FP8_GROUP},
    "ignore": ["re:(?:.*\\.)?visual(?:\\..*)?$", "lm_head"],
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj.weight"
FP8_TENSORS = {
    **TENSORS,
    **{f"model.layers.{number}.mlp.up_proj.weight": ("F8_E4M3", (4, 4)) for number in (0, 1)},
    **{f"model.layers.{number}.mlp.up_proj.weight_scale": ("BF16", (4, 1)) for number in (0, 1)},
}
FP8_TOWER = {**FP8_TENSORS, "visual.blocks.0.attn.qkv.weight": ("BF16", (4, 4))}


def in_fp8(tensors: Any = None, **quantisation: Any) -> MemoryFiles:
    """A clean folder in FP8 with changes; None for the quantisation removes it."""
    said = {"quantization_config": {**IN_FP8, **quantisation}}
    return model(FP8_TENSORS if tensors is None else tensors, config=said)


# code: (folder, base, what comparing bytes gave, file and key of the finding)
CASES: dict[str, tuple[MemoryFiles, MemoryFiles | None, Digests | None, str, str]] = {
    "unreadable-file": (cut(), None, None, "model.safetensors", ""),
    "link-leaves-folder": (strange(config__txt=Entry(leaves=True)), None, None, "config.txt", ""),
    "special-file": (strange(pipe=Entry(is_regular=False)), None, None, "pipe", ""),
    "repeated-key": (model(generation_config__json=b'{"top_k": 1, "top_k": 50, "eos_token_id": 7}'), None, None,
                     "generation_config.json", "top_k"),
    "byte-order-mark": (model(generation_config__json=b'\xef\xbb\xbf{"eos_token_id": 7}'), None, None,
                        "generation_config.json", ""),
    "wrong-type": (model(config={"vision_config": []}), None, None, "config.json", "vision_config"),
    "index-leaves-folder": (sharded({"weight_map": {**MAP, "x": "../x"}}, **SPLIT), None, None,
                            "model.safetensors.index.json", "weight_map"),
    "index-incomplete": (sharded({"weight_map": MAP, "metadata": None}, **SPLIT), None, None,
                         "model.safetensors.index.json", "metadata"),
    "settings-differ": (model(config={"hidden_act": "gelu"}), model(config={"hidden_act": "silu"}), None,
                        "config.json", "hidden_act"),
    "rope-theta-differs": (model(config={"rope_theta": 5e5}), BASE, None, "config.json", "rope_theta"),
    "rope-incomplete": (model(config={"rope_scaling": {"rope_type": "yarn"}}), None, None,
                        "config.json", "rope_scaling.rope_type"),
    "image-settings-differ": (
        model(config=VISION, preprocessor_config__json={**IMAGES, "do_resize": False}, chat_template__json=TEMPLATE),
        model(config=VISION, preprocessor_config__json={**IMAGES, "do_resize": True}, chat_template__json=TEMPLATE),
        None, "preprocessor_config.json", "do_resize"),
    "processor-settings-differ": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE,
              processor_config__json={"patch_size": None}),
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE,
              processor_config__json={"patch_size": 14}), None, "processor_config.json", "patch_size"),
    "tokenizer-broken": (model(tokenizer__json={**WORDS, "decoder": {**BYTES, "use_regex": "true"}}), None,
                         None, "tokenizer.json", "decoder.use_regex"),
    "tokenizer-differs": (model(tokenizer__json={**WORDS, "decoder": {"type": "Fuse"}}), BASE, None,
                          "tokenizer.json", "decoder.type"),
    "special-token-no-text": (model(tokenizer_config__json={**TOKENIZER, "cls_token": ["<a>"]}), None, None,
                              "tokenizer_config.json", "cls_token"),
    "special-token-unknown": (model(tokenizer_config__json={**TOKENIZER, "pad_token": "<no>"}), None, None,
                              "tokenizer_config.json", "pad_token"),
    "tensors-unlike-base": (model(), BASE, Digests(unlike={"lm_head.weight": ""}), "model.safetensors",
                            "lm_head.weight"),
    "dtype-unknown": (model(config={"torch_dtype": "int8"}), None, None, "config.json", "torch_dtype"),
    "adapter-factor-alone": (adapter({name: info for name, info in FACTORS.items() if "lora_A" in name}), BASE, None,
                             "adapter_model.safetensors", min(FACTORS).replace("lora_A", "lora_B")),
    "adapter-rank-differs": (adapter(r=8), BASE, None, "adapter_config.json", "r"),
    "shard-missing": (sharded({"weight_map": {**MAP, "model.layers.1.x": "three.safetensors"}}, **SPLIT), None, None,
                      "model.safetensors.index.json", "weight_map"),
    "index-disagrees": (sharded({"weight_map": {**MAP, "lost": "one.safetensors"}}, **SPLIT), None, None,
                        "model.safetensors.index.json", "lost"),
    "two-sets-of-weights": (model(model__safetensors__index__json={"weight_map": {"a": "one.safetensors"}},
                                  one__safetensors=b""), None, None, "model.safetensors.index.json", ""),
    "index-left-over": (model(model__safetensors__index__json={"weight_map": {"a": "one.safetensors"}}), None, None,
                        "model.safetensors.index.json", ""),
    "config-missing": (folder_of({}, TENSORS), None, None, "config.json", ""),
    "weights-missing": (folder_of({"config.json": {"model_type": "bert"}}), None, None, "model.safetensors", ""),
    "fsdp-shards-only": (folder_of({"pytorch_model_fsdp_0": b""}), None, None, "pytorch_model_fsdp_0", ""),
    "zero-shards-only": (folder_of({"zero_to_fp32.py": b"", "global_step3": b""}), None, None, "global_step3", ""),
    "shards-of-another-trainer": (folder_of({"model_world_size_2_rank_0.pt": b""}), None, None,
                                  "model_world_size_2_rank_0.pt", ""),
    "weights-unnamed": (unindexed(model__00001__of__00001=TENSORS), None, None, "model.safetensors.index.json", ""),
    "shards-left-over": (beside(model__00001__of__00001=TENSORS), None, None,
                         "model-00001-of-00001.safetensors", ""),
    "trainer-state-missing": (model(optimizer__pt=b""), None, None, "trainer_state.json", ""),
    "ids-beyond-rows": (model(tokenizer_config__json={**TOKENIZER, "added_tokens_decoder": {
        **TOKENS, "8": {"content": "<new>"}}}), None, None, "tokenizer_config.json", "<new>"),
    "class-does-not-fit": (model({f"language_model.{name}": info for name, info in TENSORS.items()}), None, None,
                           "config.json", "model_type"),
    "vision-tower-missing": (model({f"language_model.{name}": info for name, info in TENSORS.items()},
                                   config={**VISION, "model_type": "llava"}, chat_template__json=TEMPLATE,
                                   preprocessor_config__json=IMAGES), None, None, "model.safetensors", ""),
    "model-type-unknown": (model(), None, None, "config.json", "model_type"),
    "model-type-differs": (model(config={"model_type": "mistral"}), BASE, None, "config.json", "model_type"),
    "pixel-limits-unread": (
        model(preprocessor_config__json={
            "image_processor_type": "Qwen2VLImageProcessor", "size": {"min_pixels": 1, "max_pixels": 2}}),
        None, None, "preprocessor_config.json", "size"),
    "code-missing": (model(config={"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}), None, None,
                     "config.json", "auto_map"),
    "adapter-unties": (adapter({**FACTORS, "base_model.model.lm_head.weight": ("BF16", (8, 4))},
                               modules_to_save=["lm_head"]), TIED, None, "adapter_config.json", "modules_to_save"),
    "pickled-weights": (folder_of({"config.json": {}, "pytorch_model.bin": b""}), None, None, "pytorch_model.bin", ""),
    "resume-starts-from-base": (model(config=QWEN, trainer_state__json={}), None, None, "trainer_state.json", ""),
    "generation-cache-off": (model(generation_config__json={**GENERATION, "use_cache": False}), None, None,
                             "generation_config.json", "use_cache"),
    "config-cache-off": (model(config={"text_config": {"use_cache": None}}, generation_config__json=None), BASE, None,
                         "config.json", "text_config.use_cache"),
    "config-cache-off-latent": (model(config={"a": {"b": {"use_cache": False}}}), None, None,
                                "config.json", "a.b.use_cache"),
    "generation-config-lost": (model(generation_config__json=None), BASE, None, "generation_config.json", ""),
    "generation-config-missing": (model(generation_config__json=None), None, None, "generation_config.json", ""),
    "generation-defaults-lost": (model(), model(generation_config__json={**GENERATION, "repetition_penalty": 1.05}),
                                 None, "generation_config.json", "repetition_penalty"),
    "sampling-without-do-sample": (model(generation_config__json={**GENERATION, "temperature": 0.6}), None, None,
                                   "generation_config.json", "do_sample"),
    "eos-token-lost": (model(generation_config__json={"eos_token_id": [5]}), None, None,
                       "generation_config.json", "eos_token_id"),
    "eos-differs": (model(generation_config__json={"eos_token_id": [7, 6]}), BASE, None,
                    "generation_config.json", "eos_token_id"),
    "wrapped-names": (model(renamed("model.", "_orig_mod.model.")), None, None,
                      "model.safetensors", "_orig_mod.model.embed_tokens.weight"),
    "unpublished-names": (model(renamed("model.", "model.model.")), None, None,
                          "model.safetensors", "model.model.embed_tokens.weight"),
    "unmerged-lora": (model({**TENSORS, "model.layers.0.lora_A.default.weight": ("BF16", (2, 4))}), None, None,
                      "model.safetensors", "model.layers.0.lora_A.default.weight"),
    "empty-tensors": (model({**TENSORS, "model.norm.weight": ("BF16", (0,))}), None, None,
                      "model.safetensors", "model.norm.weight"),
    "tensors-missing": (model(without("model.norm.weight")), BASE, None, "model.safetensors", "model.norm.weight"),
    "tensors-extra": (model({**TENSORS, "model.more": ("BF16", (1,))}), BASE, None, "model.safetensors", "model.more"),
    "shapes-differ": (model({**TENSORS, "model.norm.weight": ("BF16", (5,))}), BASE, None,
                      "model.safetensors", "model.norm.weight"),
    "vocabulary-mismatch": (model(config={"vocab_size": 9}), None, None, "config.json", "vocab_size"),
    "layers-missing": (model(config={"num_hidden_layers": 3}), None, None, "config.json", "num_hidden_layers"),
    "identical-to-base": (model(), BASE, Digests(compared=5, is_the_base=True), "model.safetensors", ""),
    "tensors-empty": (model(), BASE, Digests(empty=("model.norm.weight",)), "model.safetensors", "model.norm.weight"),
    "values-not-finite": (model(), None, Digests(broken=("lm_head.weight",)), "model.safetensors", "lm_head.weight"),
    "head-missing": (model(without("lm_head.weight")), None, None, "config.json", "tie_word_embeddings"),
    "embedding-under-head": (model(without("model.embed_tokens.weight"), config={"tie_word_embeddings": True}), TIED,
                             None, "model.safetensors", "lm_head.weight"),
    "head-doubled": (model(config={"tie_word_embeddings": True}), None, None, "model.safetensors", "lm_head.weight"),
    "head-differs": (model(config={"tie_word_embeddings": True}), None, Digests(heads_differ=True),
                     "model.safetensors", "lm_head.weight"),
    "wider-than-base": (model({n: ("F32", shape) for n, (_, shape) in TENSORS.items()}, config={"torch_dtype": None}),
                        BASE, None, "model.safetensors", "lm_head.weight"),
    "dtype-disagrees": (model(config={"torch_dtype": "float32"}), None, None, "config.json", "torch_dtype"),
    "mixed-dtypes": (model({**TENSORS, "model.norm.weight": ("F32", (4,))}), None, None, "model.safetensors", ""),
    "quantization-left-over": (model(config={"quantization_config": {"load_in_4bit": True}}), None, None,
                               "config.json", "quantization_config"),
    "fp8-scale-missing": (in_fp8({name: info for name, info in FP8_TENSORS.items() if name != f"{UP}_scale"}), BASE,
                          None, "model.safetensors", UP),
    "fp8-scale-shape": (in_fp8({**FP8_TENSORS, f"{UP}_scale": ("BF16", (4,))}), BASE, None,
                        "model.safetensors", f"{UP}_scale"),
    "fp8-unsaid": (model(FP8_TENSORS), None, None, "config.json", "quantization_config"),
    "quantization-disagrees": (in_fp8(ignore=["lm_head", UP.removesuffix(".weight")]), BASE, None,
                               "config.json", "quantization_config.ignore"),
    "ignore-misses": (model(FP8_TOWER, config={**QWEN, "quantization_config": {
        **IN_FP8, "ignore": ["lm_head", "visual.blocks.0.attn.qkv"]}}), None, None,
        "config.json", "quantization_config.ignore"),
    "nested-text-config": (model(config={**QWEN, "text_config": {"hidden_size": 4}}), None, None,
                           "config.json", "text_config"),
    "rope-parameters-alone": (
        folder_of({"config.json": {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}},
                   "generation_config.json": {}}, {}), None, None, "config.json", "rope_parameters"),
    "tokenizers-backend": (model(tokenizer_config__json={**TOKENIZER, "tokenizer_class": "TokenizersBackend"}), None,
                           None, "tokenizer_config.json", "tokenizer_class"),
    "extra-special-tokens-list": (model(tokenizer_config__json={**TOKENIZER, "extra_special_tokens": ["<a>"]}), None,
                                  None, "tokenizer_config.json", "extra_special_tokens"),
    "preprocessor-config-missing": (model(processor_config__json={"image_processor": IMAGES}), None, None,
                                    "processor_config.json", "image_processor"),
    "unknown-image-processor": (
        model(preprocessor_config__json={"image_processor_type": "Qwen2_5_VLImageProcessor"}), None, None,
        "preprocessor_config.json", "image_processor_type"),
    "remote-code": (model(config={"auto_map": {"AutoConfig": "evil.Config"}}), None, None, "config.json", "auto_map"),
    "tokenizer-missing": (model(tokenizer__json=None), None, None, "tokenizer.json", ""),
    "processor-missing": (model(config=VISION, chat_template__json=TEMPLATE), None, None,
                          "preprocessor_config.json", ""),
    "pixel-limits-differ": (
        model(config=VISION, chat_template__json=TEMPLATE,
              preprocessor_config__json={"min_pixels": 1, "max_pixels": 2}),
        model(config=VISION, preprocessor_config__json={"size": {"shortest_edge": 1, "longest_edge": 3}},
              chat_template__json=TEMPLATE), None, "preprocessor_config.json", "size"),
    "pixel-limits-disagree": (model(preprocessor_config__json={"max_pixels": 2, "size": {"longest_edge": 3}}), None,
                              None, "preprocessor_config.json", "max_pixels"),
    "chat-template-lost": (model(config=VISION, preprocessor_config__json=IMAGES), VLM_BASE, None,
                           "chat_template.json", ""),
    "chat-template-json-empty": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json={}, chat_template__jinja=b"image"),
        None, None, "chat_template.json", "chat_template"),
    "tokenizer-template-lost": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE),
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE,
              tokenizer_config__json={**TOKENIZER, **TEMPLATE}), None, "tokenizer_config.json", "chat_template"),
    "tokenizer-empty": (model(tokenizer__json=b""), None, None, "tokenizer.json", ""),
    "tokenizer-config-lost": (model(tokenizer_config__json=None), BASE, None, "tokenizer_config.json", ""),
    "setting-not-taken": (model(config={"attention_dropout": "0.0"}), None, None, "config.json", "attention_dropout"),
    "number-too-small": (model(config={"sliding_window": -1}), None, None, "config.json", "sliding_window"),
    "layer-types-too-few": (model(config={"layer_types": ["full_attention"]}), None, None,
                            "config.json", "layer_types"),
    "rope-type-unknown": (model(config={"rope_scaling": {"rope_type": "tluafed"}}), None, None,
                          "config.json", "rope_scaling.rope_type"),
    "part-of-another-dtype": (model(config={**VISION, "vision_config": {"torch_dtype": "float16"}},
                                    preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE), None, None,
                              "config.json", "vision_config.torch_dtype"),
    "generation-config-of-model": (model(generation_config__json={**GENERATION, "model_type": "llama"}), None, None,
                                   "generation_config.json", "model_type"),
    "input-names-wrong": (model(tokenizer_config__json={**TOKENIZER, "model_input_names": []}), None, None,
                          "tokenizer_config.json", "model_input_names"),
    "special-tokens-lost": (model(), model(tokenizer_config__json={**TOKENIZER, "pad_token": "<pad>"}), None,
                            "tokenizer_config.json", "pad_token"),
    "tokenizer-class-unknown": (
        model(tokenizer_config__json={**TOKENIZER, "tokenizer_class": "NoSuchTokenizer"}), BASE, None,
        "tokenizer_config.json", "tokenizer_class"),
    "chat-template-broken": (model(chat_template__jinja=b"{% for one in messages %}{{ one }}"), None, None,
                             "chat_template.jinja", ""),
    "image-size-unusable": (
        model(config=VISION, preprocessor_config__json={**IMAGES, "size": {}}, chat_template__json=TEMPLATE), VLM_BASE,
        None, "preprocessor_config.json", "size"),
    "picture-class-differs": (
        model(config=VISION, preprocessor_config__json={**IMAGES, "image_processor_type": "SiglipImageProcessor"},
              chat_template__json=TEMPLATE), VLM_BASE, None, "preprocessor_config.json", "image_processor_type"),
    "adapter-setting-unusable": (adapter(bias=None), BASE, None, "adapter_config.json", "bias"),
    "adapter-shapes-differ": (adapter({**FACTORS, max(FACTORS): ("F32", (3, 2))}), BASE, None,
                              "adapter_model.safetensors", max(FACTORS)),
    "model-type-missing": (model(config={"model_type": None}), None, None, "config.json", "model_type"),
    "rope-lost": (model(), model(config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), None,
                  "config.json", "rope_scaling"),
    "settings-lost": (model(), model(config={"rms_norm_eps": 0.125}), None, "config.json", "rms_norm_eps"),
    "chat-template-missing": (model(config=VISION, preprocessor_config__json=IMAGES), None, None,
                              "chat_template.jinja", ""),
    "chat-templates-differ": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE,
              chat_template__jinja=b"image"),
        VLM_BASE, None, "chat_template.jinja", "chat_template"),
    "chat-template-changed": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json={"chat_template": "{{ image }}"}),
        VLM_BASE, None, "chat_template.json", "chat_template"),
    "chat-templates-unequal": (model(chat_template__json=TEMPLATE, chat_template__jinja=b"y"), None, None,
                               "chat_template.jinja", "chat_template"),
    "tokenizer-cuts": (model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json=TEMPLATE,
                             tokenizer__json={**WORDS, "truncation": {"max_length": 9}}), None, None,
                       "tokenizer.json", "truncation"),
    "template-without-pictures": (
        model(config=VISION, preprocessor_config__json=IMAGES, chat_template__json={"chat_template": "{{ text }}"}),
        None, None, "chat_template.json", "chat_template"),
    "template-in-tokenizer-alone": (
        model(config=VISION, preprocessor_config__json=IMAGES, tokenizer_config__json={**TOKENIZER, **TEMPLATE}),
        None, None, "tokenizer_config.json", "chat_template"),
    "architectures-missing": (model(config={"architectures": None}), None, None, "config.json", "architectures"),
    "architectures-differ": (model(config={"architectures": ["FSDPLlamaForCausalLM"]}), BASE, None, "config.json",
                             "architectures"),
    "value-head-stored": (model({**TENSORS, "v_head.summary.weight": ("BF16", (1, 4))}), None, None,
                          "model.safetensors", "v_head.summary.weight"),
    "answers-capped": (model(generation_config__json={**GENERATION, "max_new_tokens": 16}), BASE, None,
                       "generation_config.json", "max_new_tokens"),
    "theta-in-rope-scaling": (
        model(config={"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, drop=("rope_theta",)),
        None, None, "config.json", "rope_scaling"),
    "experts-stacked": (model({**TENSORS, "model.layers.1.mlp.experts.down_proj": ("BF16", (2, 4, 4))},
                              config={"model_type": "qwen3_moe"}), None, None,
                        "model.safetensors", "model.layers.1.mlp.experts.down_proj"),
    "experts-renamed": (model(config={"model_type": "qwen3_moe", "num_local_experts": 4}), None, None,
                        "config.json", "num_local_experts"),
    "experts-transposed": (model({**TENSORS, "model.layers.1.mlp.experts.down_proj": ("BF16", (2, 4, 6))}),
                           model({**TENSORS, "model.layers.1.mlp.experts.down_proj": ("BF16", (2, 6, 4))}), None,
                           "model.safetensors", "model.layers.1.mlp.experts.down_proj"),
    "layer-types-renamed": (model(config={"model_type": "granitemoehybrid", "layer_types": ["linear_attention"]}),
                            None, None, "config.json", "layer_types"),
    "adapter-of-mlx": (folder_of({"adapter_config.json": {"fine_tune_type": "lora", "lora_parameters": {}}}), BASE,
                       None, "adapter_config.json", "peft_type"),
    "adapter-names-wrapped": (
        adapter({f"base_model.model._orig_mod.{name[17:]}": info for name, info in FACTORS.items()}),
        BASE, None, "adapter_model.safetensors",
        "base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight"),
    "adapter-named-for-older": (adapter(), model(config=QWEN), None, "adapter_model.safetensors",
                                "model.layers.0.mlp.up_proj"),
    "adapter-rank-high": (adapter(r=64), BASE, None, "adapter_config.json", "r"),
    "adapter-weights-missing": (folder_of({"adapter_config.json": LORA}), BASE, None, "adapter_model.safetensors", ""),
    "adapter-alpha-zero": (adapter(lora_alpha=0), BASE, None, "adapter_config.json", "lora_alpha"),
    "adapter-patterns-unread": (adapter(alpha_pattern={"q_proj": 80}), BASE, None,
                                "adapter_config.json", "alpha_pattern"),
    "adapter-kind-refused": (adapter(use_dora=True), BASE, None, "adapter_config.json", "use_dora"),
    "adapter-on-vision": (adapter({**FACTORS, **Q_LORA}),
                          model({**TENSORS, "visual.blocks.0.attn.qkv.weight": ("BF16", (4, 4))}),
                          None, "adapter_config.json", "target_modules"),
    "adapter-with-whole-modules": (adapter(modules_to_save=["lm_head"]), BASE, None,
                                   "adapter_config.json", "modules_to_save"),
    "adapter-reaches-nothing": (adapter({name.replace("layers", "blocks"): info for name, info in FACTORS.items()}),
                                BASE, None, "adapter_model.safetensors", "model.blocks.0.mlp.up_proj"),
    "adapter-is-zero": (adapter(), BASE, Digests(is_zero=True), "adapter_model.safetensors", ""),
    "adapter-base-elsewhere": (adapter(), None, None, "adapter_config.json", "base_model_name_or_path"),
    "adapter-beside-config": (folder_of({"adapter_config.json": LORA, "config.json": {"use_cache": False}}, FACTORS),
                              BASE, None, "config.json", ""),
    "padding-beyond-rows": (model(generation_config__json={**GENERATION, "pad_token_id": 99}), BASE, None,
                            "generation_config.json", "pad_token_id"),
    "added-tokens-missing": (
        model(tokenizer_config__json=ADDED_ELSEWHERE, tokenizer__json={"model": {"vocab": {"</s>": 0}}}),
        None, None, "tokenizer.json", "added_tokens"),
    "tokenizer-class-differs": (model(tokenizer_config__json={**TOKENIZER, "tokenizer_class": "GemmaTokenizer"}),
                                BASE, None, "tokenizer_config.json", "tokenizer_class"),
    "tokenizer-flags-differ": (
        model(tokenizer_config__json={**TOKENIZER, "add_eos_token": True}),
        model(tokenizer_config__json={**TOKENIZER, "add_eos_token": False}), None,
        "tokenizer_config.json", "add_eos_token"),
    "answers-with-tuples": (model(config={"return_dict": False}), None, None, "config.json", "return_dict"),
    "cache-kind-differs": (model(generation_config__json={**GENERATION, "cache_implementation": "offloaded"}), BASE,
                           None, "generation_config.json", "cache_implementation"),
    "states-without-dict": (model(generation_config__json={**GENERATION, "output_hidden_states": True}), None, None,
                            "generation_config.json", "output_hidden_states"),
    "experts-in-float64": (
        model({**TENSORS, "model.layers.0.mlp.experts.0.up_proj.weight": ("F64", (9, 9))},
              config={"torch_dtype": "float64"}), None, None, "config.json", "torch_dtype"),
    "rope-share-differs": (model(config={"rope_parameters": {**ROPE, "partial_rotary_factor": -1.5}}),
                           model(config={"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}), None,
                           "config.json", "rope_parameters.partial_rotary_factor"),
    "rope-scaling-differs": (model(config={"rope_parameters": {**STRETCHED, "beta_fast": 16}}),
                             model(config={"rope_parameters": STRETCHED}), None,
                             "config.json", "rope_parameters.beta_fast"),
    "rope-no-object": (model(config={"rope_parameters": {"full_attention": ROPE, "sliding_attention": "7"}}), None,
                       None, "config.json", "rope_parameters.sliding_attention"),
    "dropout-no-share": (model(config={"model_type": "phi", "resid_pdrop": -1}), None, None,
                         "config.json", "resid_pdrop"),
    "video-size-unusable": (model(video_preprocessor_config__json={"size": {"width": 3}}), None, None,
                            "video_preprocessor_config.json", "size"),
    "model-below": (model(), None, None, "checkpoint-1", ""),
    "adapter-beside-model": (folder_of({"adapter_config.json": LORA, "model.safetensors": b""}, FACTORS), BASE, None,
                             "model.safetensors", ""),
}  # fmt: skip
# Codes that are another side of the same fault.
COMPANIONS = {
    "config-cache-off": {"generation-config-lost", "setting-not-taken"},
    "layer-types-renamed": {"layer-types-too-few"},
    "wrapped-names": {"head-missing"},
    "adapter-rank-high": {"adapter-rank-differs"},
    "experts-in-float64": {"mixed-dtypes"},
    "rope-share-differs": {"rope-parameters-alone"},
    "rope-scaling-differs": {"rope-parameters-alone"},
}


def diagnose(
    files: MemoryFiles,
    base: MemoryFiles | None,
    digests: Digests | None = None,
    *,
    is_known: bool = True,
    is_below: bool = False,
) -> list[Finding]:
    folder = replace(read_folder(files), is_known=is_known)
    folder = replace(folder, below=folder.path.parent if is_below else None)
    folder = replace(folder, base=None if base is None else read_folder(base), digests=digests)
    return list(diagnose_folder(folder).findings)


def test_every_rule_has_a_case() -> None:
    assert sorted(CASES) == sorted(rule.code for rule in ALL_RULES)


@pytest.mark.parametrize("files", [BASE, TIED, VLM_BASE])
def test_the_clean_folders_are_clean(files: MemoryFiles) -> None:
    assert diagnose(files, None) == []
    assert diagnose(files, files) == []


@pytest.mark.parametrize("code", CASES)
def test_the_rule_finds_its_fault_and_no_other_does(code: str) -> None:
    files, base, digests, file, key = CASES[code]
    findings = diagnose(files, base, digests, is_known=code != "model-type-unknown", is_below=code == "model-below")
    found = next(finding for finding in findings if finding.code == code)
    assert (found.file, found.key) == (file, key)
    others = {finding.code for finding in findings} - {code}
    assert others <= COMPANIONS.get(code, set()), others


@pytest.mark.parametrize(("rank", "alpha", "is_read"), [(16, 32, True), (16, 16, False), (10**400, 16, False)])
def test_ranks_of_modules_with_the_adapters_own_scale_are_no_fault(rank: int, alpha: int, is_read: bool) -> None:
    told = adapter(r=8, lora_alpha=16, rank_pattern={"q_proj": rank}, alpha_pattern={"q_proj": alpha})
    codes = {finding.code for finding in diagnose(told, BASE)}
    assert ("adapter-patterns-unread" not in codes) is is_read


def test_a_base_with_the_same_setting_is_no_fault() -> None:
    greedy: Json = {"eos_token_id": [7, 6]}
    assert diagnose(model(generation_config__json=greedy), model(generation_config__json=greedy)) == []
    listed = {**TOKENIZER, "extra_special_tokens": ["<a>"]}
    assert diagnose(model(tokenizer_config__json=listed), model(tokenizer_config__json=listed)) == []


@pytest.mark.parametrize(
    ("model_type", "stored", "wanted"),
    [
        ("llava", "vision_tower.encoder.layers.0.x", "vision_tower.vision_model.encoder.layers.0.x"),
        ("llava", "model.vision_tower.embeddings.x", "vision_tower.vision_model.embeddings.x"),
        ("llava", "model.language_model.layers.0.x", "language_model.model.layers.0.x"),
        ("llava", "vision_tower.vision_model.embeddings.x", None),
        ("llava", "vision_tower.patch_conv.weight", None),  # a Pixtral tower has no such part
        ("internvl", "vision_tower.embeddings.cls_token", None),
        ("internvl", "model.vision_tower.embeddings.cls_token", "vision_tower.embeddings.cls_token"),
        ("qwen2_5_vl", "model.visual.x", "visual.x"),
        ("aya_vision", "model.vision_tower.encoder.x", "vision_tower.vision_model.encoder.x"),
        ("got_ocr2", "model.vision_tower.layers.0.x", "vision_tower.layers.0.x"),
        ("llava_next_video", "model.image_newline", "image_newline"),
        ("vipllava", "lm_head.weight", "language_model.lm_head.weight"),
        ("mllama", "model.vision_model.x", "vision_model.x"),
        ("mllama", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("minimax", "model.layers.0.mlp.gate.weight", None),
        ("llama", "vision_tower.encoder.x", None),
    ],
)
def test_published_names_of_families(model_type: str, stored: str, wanted: str | None) -> None:
    assert plan_renames([stored], None, model_type) == ({} if wanted is None else {stored: wanted})
    if wanted is not None:
        assert plan_renames([stored], frozenset({wanted}), model_type) == {stored: wanted}
        assert plan_renames([stored], frozenset({stored}), model_type) == {}  # the base has it so


def prefixed(prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name.replace("model.model.layers", prefix): info for name, info in FACTORS.items()}


@pytest.mark.parametrize(
    ("model_type", "prefix", "is_reached"),
    [
        ("qwen2_5_vl", "model.model.layers", True),  # as 4.49 names it, and as it is published
        ("qwen2_5_vl", "model.model.language_model.layers", True),  # as 4.52 and later name it
        ("qwen2_5_vl", "model.language_model.layers", False),  # one prefix short: it silently does nothing
        ("unheard_of", "model.any.prefix.layers", True),  # nothing is known of this family's live names
        ("unheard_of", "model.model.stages", False),
    ],
)
def test_an_adapter_is_held_against_live_and_published_names(model_type: str, prefix: str, is_reached: bool) -> None:
    base = model(config={"model_type": model_type})
    codes = {finding.code for finding in diagnose(adapter(prefixed(prefix)), base)}
    assert ("adapter-reaches-nothing" not in codes) is is_reached


EXPERTS = {f"base_model.model.model.layers.0.mlp.experts{depth}.lora_{side}.weight": ("F32", shape)
           for depth in ("", ".base_layer") for side, shape in (("A", (4, 4)), ("B", (4, 4)))}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "is_reached"),
    [
        ({"model.layers.0.mlp.experts.0.down_proj.weight"}, True),
        ({"model.layers.0.block_sparse_moe.experts.0.w2.weight"}, True),
        ({"model.layers.0.mlp.experts.gate_up_proj"}, True),  # as transformers 5 stacks them
        ({"model.layers.0.mlp.experts.0.gate_proj.weight"}, False),  # half of a parameter
        ({"model.layers.1.mlp.experts.0.down_proj.weight"}, False),
    ],
)
def test_an_adapter_on_stacked_experts_reaches_those_that_are_stored_one_by_one(
    stored: set[str], is_reached: bool
) -> None:
    base = model(dict.fromkeys(stored, ("BF16", (4, 4))), config={"model_type": "mixtral"})
    codes = {finding.code for finding in diagnose(adapter(EXPERTS), base)}
    assert ("adapter-reaches-nothing" not in codes) is is_reached


@pytest.mark.parametrize(
    ("model_type", "rows", "is_right"), [("mllama", 16, True), ("mllama", 8, False), ("llama", 16, False)]
)
def test_mllama_embeds_eight_more_tokens_than_its_vocabulary_has(model_type: str, rows: int, is_right: bool) -> None:
    tensors = {**TENSORS, "model.embed_tokens.weight": ("BF16", (rows, 4))}
    codes = {finding.code for finding in diagnose(model(tensors, config={"model_type": model_type}), None)}
    assert ("vocabulary-mismatch" not in codes) is is_right


def test_a_head_that_cannot_be_dropped_is_not_said_to_be_mendable() -> None:
    tensors = {**TENSORS, "lm_head.weight": ("F32", (8, 4))}
    findings = diagnose(model(tensors, config={"tie_word_embeddings": True}), None)
    assert [f.repairable for f in findings if f.code == "head-doubled"] == [False]


def test_settings_of_sampling_are_those_that_exports_know() -> None:
    assert set(NEUTRAL) == SAMPLING


@pytest.mark.parametrize("tensors", [FP8_TENSORS, FP8_TOWER])
def test_a_folder_in_fp8_is_clean(tensors: Any) -> None:
    assert diagnose(in_fp8(tensors), None) == []
    assert {finding.code for finding in diagnose(in_fp8(), BASE)} == set()


@pytest.mark.parametrize(
    ("ignore", "fails"),
    [
        (["visual.blocks.0.attn.qkv", "lm_head"], "transformers>=4.52"),
        (["model.visual.blocks.0.attn.qkv", "lm_head"], "transformers<4.52"),
        (["re:model.visual.*", "re:.*lm_head"], "transformers<4.52"),
        (["lm_head"], "transformers; vllm; sglang"),
        (["re:.*visual.*"], "transformers"),
        (["re:visual.*", "re:model.visual.*", "lm_head"], ""),
        (["re:.*visual.*", "lm_head"], ""),
        (["re:(a+)+$", "lm_head"], ""),  # takes for ever on a long name: not tried
        (["re:(", "lm_head"], ""),
        (["Qwen2_5_VLVisionBlock", "lm_head"], ""),  # a class, which names do not tell
    ],
)
def test_layers_to_leave_alone_are_named_as_each_reader_names_them(ignore: list[str], fails: str) -> None:
    said = {**QWEN, "quantization_config": {**IN_FP8, "ignore": ignore}}
    found = [one for one in diagnose(model(FP8_TOWER, config=said), None) if one.code == "ignore-misses"]
    assert [one.fails for one in found] == ([fails] if fails else [])
    assert all(one.repairable for one in found)


def test_a_tied_head_is_a_layer_to_leave_alone_too() -> None:
    tensors = {name: info for name, info in FP8_TENSORS.items() if name != "lm_head.weight"}
    folder = model(tensors, config={"tie_word_embeddings": True, "quantization_config": {**IN_FP8, "ignore": []}})
    [found] = [one for one in diagnose(folder, None) if one.code == "ignore-misses"]
    assert str(found.found).startswith("does not fit 1 of the layers that are stored unquantised (lm_head")


def test_a_format_that_is_not_fp8_disagrees_with_weights_that_are() -> None:
    group = {**FP8_GROUP, "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    [found] = diagnose(in_fp8(config_groups={"group_0": group}), None)
    assert (found.code, found.key) == ("quantization-disagrees", "quantization_config.config_groups")


@pytest.mark.parametrize("method", ["fp8", "modelopt", "fbgemm_fp8"])
def test_fp8_of_other_makers_is_not_judged(method: str) -> None:
    tensors = {name.replace("_scale", "_scale_inv"): info for name, info in FP8_TENSORS.items()}
    folder = model(tensors, config={"quantization_config": {"quant_method": method, "weight_block_size": [128, 128]}})
    assert diagnose(folder, None) == []


def test_a_lost_level_comes_back_whole() -> None:
    part: Json = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}
    whole: Json = {"model_type": "llava", "text_config": part, "vision_config": {"model_type": "clip_vision_model"}}
    base = model(config=whole, drop=("num_hidden_layers", "vocab_size"))
    ours = model(config={**whole, "text_config": None}, drop=("num_hidden_layers", "vocab_size"))
    found = next(one for one in diagnose(ours, base) if one.code == "settings-lost")
    assert {(edit.path, str(edit.value)) for edit in found.remedies if isinstance(edit, Edit)} == {
        (("text_config",), str(part))
    }


def test_a_dtype_that_is_a_list_is_no_traceback() -> None:
    found = diagnose(model(config={"vision_config": {"torch_dtype": ["float16"]}}), None)
    assert "part-of-another-dtype" not in {one.code for one in found}
