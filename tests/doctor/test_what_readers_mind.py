"""Changes that readers mind and changes of the same kind that none minds, made in good folders.

The readers were asked of each: transformers 5.24, 4.57 and 4.49 (`scripts/benchmarks/oracle/readers.py`), and
vLLM 0.31 (`servers.py`) of those in the dialect of servers.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.readers import Reader, concerns
from grpo_toolkit.doctor.repair import repair_checkpoint
from scripts.benchmarks.oracle.bases import good_folder
from scripts.benchmarks.oracle.cases import Case, changed
from scripts.benchmarks.oracle.folders import pack, unpack, write
from scripts.benchmarks.oracle.mutations.operators import Mutation
from scripts.benchmarks.oracle.score import Examiner, Said, findings, reader
from tests.support.models import build_llama

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
PICTURES, PROCESSOR, WEIGHTS = "preprocessor_config.json", "processor_config.json", "model.safetensors"
ADAPTER, INDEX = "adapter_model.safetensors", "model.safetensors.index.json"
V4 = ("4.49.0", "4.57.6")
ALL = (*V4, "5.24.0")
V5 = ("5.24.0",)

Row = tuple[str, str, str, str, str, str, tuple[str, ...]]
# The folder, the operator, the file, the path in it (with "/"), what with; the code, and which readers it is of.
MINDED: list[Row] = [
    ("llama/v4/full", "null-key", GENERATION, "use_cache", "", "generation-cache-off", V4),
    ("gemma2/published/full", "drop-file", GENERATION, "", "", "generation-config-lost", ALL),
    ("gemma2/v4/full", "drop-file", GENERATION, "", "", "generation-config-lost", ("4.49.0",)),
    ("gemma2/published/full", "move-to-file", CONFIG, "cache_implementation", GENERATION, "cache-kind-differs", ALL),
    ("mixtral/v4/full", "swap-class", TOKENIZER, "tokenizer_class", "LlamaTokenizer", "tokenizer-class-differs", V4),
    ("llama/v4/full", "drop-key", TOKENIZER, "tokenizer_class", "", "tokenizer-class-differs", V4),
    ("gemma2/v5/full", "drop-key", TOKENIZER, "tokenizer_class", "", "tokenizer-class-differs", ALL),
    ("paligemma/published/adapter", "flip-key", TOKENIZER, "add_eos_token", "", "tokenizer-flags-differ", V4),
    ("paligemma/published/full", "unknown-token", TOKENIZER, "bos_token", "", "special-tokens-lost", ALL),
    ("paligemma/v5/full", "unknown-token", TOKENIZER, "image_token", "", "special-tokens-lost", V5),
    ("llama/v5/full", "drop-key", "tokenizer.json", "added_tokens", "", "added-tokens-missing", V5),
    ("llava/v4/full", "empty-key", "tokenizer.json", "post_processor", "", "tokenizer-broken", ALL),
    ("paligemma/published/full", "drop-file", TOKENIZER, "", "", "tokenizer-config-lost", ALL),  # has the template
    ("mistral3/v4/full", "drop-file", TOKENIZER, "", "", "tokenizer-config-lost", ALL),
    ("llava/v4/full", "null-key", PICTURES, "image_std", "", "image-settings-differ", V5),
    ("llava/v4/full", "null-key", PICTURES, "rescale_factor", "", "image-settings-differ", ALL),
    ("paligemma/v4/full", "drop-key", PICTURES, "image_seq_length", "", "image-settings-differ", ALL),
    ("paligemma/v4/full", "move-level", PICTURES, "do_rescale", "size", "image-size-unusable", ALL),
    ("mistral3/v4/full", "move-level", PICTURES, "patch_size/width", "up", "image-settings-differ", ALL),
    ("qwen3_5/v5/full", "change-text", PROCESSOR, "video_processor/video_processor_type", "",
     "picture-class-differs", ALL),
    ("mixtral/v5/full", "swap-class", CONFIG, "dtype", "float64", "experts-in-float64", V5),
    ("llava/published/full", "swap-class", CONFIG, "dtype", "float64", "part-of-another-dtype", ("4.57.6",)),
    ("llava/published/full", "wrap-key", CONFIG, "text_config/torch_dtype", "", "wrong-type", ALL),
    ("llava/published/full", "flip-key", CONFIG, "vision_config/return_dict", "", "answers-with-tuples", V4),
    ("llava/published/full", "flip-key", CONFIG, "vision_config/torchscript", "",
     "answers-with-tuples", ("4.49.0",)),
    ("llava/published/full", "flip-key", CONFIG, "text_config/return_dict", "",
     "answers-with-tuples", ("4.57.6", "5.24.0")),
    ("llava/published/full", "flip-key", CONFIG, "text_config/tie_word_embeddings", "", "head-differs", V4),
    ("llama/published/full", "change-text", CONFIG, "torch_dtype", "", "dtype-unknown", ("4.49.0",)),
    ("qwen2/v4/full", "wrap-key", "tokenizer.json", "added_tokens", "", "tokenizer-broken", V4),
    ("mistral3/v4/full", "null-key", TOKENIZER, "extra_special_tokens", "", "special-token-no-text", V4),
    ("qwen2/v5/full", "null-key", CONFIG, "head_dim", "", "settings-differ", ALL),
    ("qwen3_5/v5/sharded", "empty-key", INDEX, "weight_map", "", "index-incomplete", ALL),
    ("qwen3_5/v5/full", "retype-key", PROCESSOR, "video_processor/size", "",
     "video-size-unusable", ("4.57.6", "5.24.0")),
    ("gemma3/v5/full", "drop-key", PROCESSOR, "image_processor", "", "processor-missing", ("4.49.0", "5.24.0")),
    ("phi3/v5/full", "negate-number", CONFIG, "rope_parameters/partial_rotary_factor", "", "rope-share-differs", ALL),
    ("gemma3/v5/full", "retype-key", CONFIG, "text_config/rope_parameters/sliding_attention", "",
     "rope-no-object", V5),
    ("gemma2/v4/full", "null-key", CONFIG, "sliding_window", "", "number-too-small", ALL),
    ("phi3/v5/full", "drop-key", CONFIG, "pad_token_id", "", "ids-beyond-rows", ALL),
    ("llama/v4/full", "prefix-tensors", WEIGHTS, "", "-model.", "unpublished-names", V4),
    ("qwen2/v4/full", "prefix-tensors", WEIGHTS, "", "model.", "unpublished-names", V4),
    ("mixtral/v4/full", "prefix-tensors", WEIGHTS, "", "model.", "unpublished-names", V4),
    ("gemma3/v5/full", "prefix-tensors", WEIGHTS, "", "model.", "unpublished-names", ALL),
    ("qwen3_5/v5/full", "swap-tensors", WEIGHTS, "model.language_model.layers.0.linear_attn.dt_bias",
     "model.language_model.layers.0.linear_attn.A_log", "tensors-unlike-base", ALL),
    ("llama/published/adapter", "zero-tensor", ADAPTER,
     "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", "", "tensors-empty", ALL),
]  # fmt: skip
UNMINDED: list[tuple[str, str, str, str, str]] = [
    ("llama/v5/full", "wrap-key", GENERATION, "use_cache", ""),  # true all the same
    ("llava/v4/full", "flip-key", CONFIG, "tie_word_embeddings", ""),  # the text model has its own
    ("mixtral/v4/full", "flip-key", CONFIG, "use_cache", ""),  # generate asks the other file
    ("gemma3/v5/full", "far-id", CONFIG, "pad_token_id", ""),  # the text model has its own
    ("llava/published/full", "far-id", CONFIG, "text_config/decoder_start_token_id", ""),
    ("gemma3/v5/full", "far-id", CONFIG, "eoi_token_index", ""),
    ("qwen3_5/v5/full", "swap-class", CONFIG, "vision_config/model_type", "unknown_model"),
    ("qwen3_5/v5/full", "swap-class", CONFIG, "vision_config/hidden_act", "gelu"),
    ("llava/published/full", "wrap-key", CONFIG, "text_config/chunk_size_feed_forward", ""),
    ("gemma2/published/full", "null-key", CONFIG, "cache_implementation", ""),
    ("gemma3/v5/full", "null-key", CONFIG, "text_config/rope_parameters", ""),
    ("gemma3/v5/full", "null-key", CONFIG, "text_config/rope_parameters/full_attention/rope_theta", ""),
    ("qwen3_5/v5/full", "empty-key", CONFIG, "text_config/rope_parameters", ""),
    ("qwen3_5/v5/full", "drop-key", CONFIG, "vision_config/rope_parameters/rope_type", ""),
    ("mistral3/v4/full", "move-level", CONFIG, "vision_config/rope_parameters", "up"),
    ("gemma2/published/full", "move-level", CONFIG, "rope_theta", "rope_parameters"),
    ("phi3/v5/full", "empty-key", "tokenizer.json", "added_tokens", ""),
    ("qwen2/v4/full", "drop-file", TOKENIZER, "", ""),
    ("paligemma/v4/full", "drop-file", TOKENIZER, "", ""),  # of 4.x, whose processor names the tokenizer's class
    ("paligemma/v4/full", "unknown-token", TOKENIZER, "image_token", ""),
    ("paligemma/published/full", "change-text", TOKENIZER, "tokenizer_class", ""),
    ("paligemma/published/full", "null-key", PICTURES, "image_std", ""),
    ("gemma2/v4/full", "swap-class", TOKENIZER, "tokenizer_class", "Qwen2TokenizerFast"),
    ("qwen3_5/v5/full", "drop-key", TOKENIZER, "tokenizer_class", ""),
    ("llava/published/adapter", "list-json", "chat_template.json", "", ""),
    ("paligemma/published/adapter", "empty-key", "chat_template.json", "chat_template", ""),
    ("qwen2/published/adapter", "duplicate-file", ADAPTER, "", WEIGHTS),
    ("llava/v5/full", "zero-tensor", WEIGHTS, "vision_tower.post_layernorm.weight", ""),
    ("qwen3_5/v5/full", "prefix-tensors", WEIGHTS, "", "model."),
]
# The same of vLLM: the code, and whether it minds.
OF_VLLM: list[tuple[str, str, str, str, str, str, bool]] = [
    ("gemma2/served/adapter", "null-key", "tokenizer.json", "added_tokens", "", "tokenizer-broken", False),
    ("gemma2/served/adapter", "drop-file", "chat_template.jinja", "", "", "chat-template-lost", False),
    ("llava/served/sharded", "drop-entry", INDEX,
     "weight_map/vision_tower.vision_model.encoder.layers.1.layer_norm1.bias", "", "index-disagrees", False),
    ("llama/served/checkpoint", "change-text", TOKENIZER, "pad_token", "", "special-token-unknown", False),
    ("llava/served/checkpoint", "change-text", TOKENIZER, "eos_token", "", "special-token-unknown", True),
    ("llama/served/full", "far-id", CONFIG, "pad_token_id", "", "ids-beyond-rows", False),
    ("phi3/served/checkpoint", "empty-key", TOKENIZER, "pad_token", "", "special-tokens-lost", False),
    ("mixtral/served/sharded", "swap-class", CONFIG, "dtype", "float64", "experts-in-float64", False),
    ("mistral3/served/sharded", "swap-class", CONFIG, "architectures", "LlamaForCausalLM",
     "architectures-differ", True),
    ("qwen2/served/full", "drop-key", CONFIG, "tie_word_embeddings", "", "head-missing", True),
    ("gemma2/served/sharded", "duplicate-file", CONFIG, "", GENERATION, "generation-config-of-model", False),
    ("gemma2/served/adapter", "flatten-tensor", ADAPTER,
     "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "", "empty-tensors", True),
    ("gemma2/served/export", "prefix-tensors", WEIGHTS, "", "base_model.model.", "wrapped-names", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def examiner(tmp_path_factory: pytest.TempPathFactory) -> Examiner:
    return Examiner(_scratch(tmp_path_factory))


def _scratch(made: pytest.TempPathFactory) -> Path:
    return made.mktemp("folders")


def _said(examiner: Examiner, folder: str, operator: str, file: str, path: str, to: str) -> tuple[Said, ...]:
    parts = (path,) if path.endswith((".weight", ".dt_bias")) else tuple(path.split("/")) if path else ()
    case = Case(folder, (Mutation(operator, file, parts, to),))
    made = changed(case)
    assert made is not None, case
    return examiner.examine(case, made, {}).said


@pytest.mark.parametrize(("folder", "operator", "file", "path", "to", "code", "who"), MINDED)
def test_it_says_who_minds(
    examiner: Examiner, folder: str, operator: str, file: str, path: str, to: str, code: str, who: tuple[str, ...]
) -> None:
    found = [one for one in _said(examiner, folder, operator, file, path, to) if one.code == code]
    assert tuple(version for version in ALL if any(concerns(one.fails, reader(version)) for one in found)) == who


@pytest.mark.parametrize(("folder", "operator", "file", "path", "to"), UNMINDED)
def test_it_is_silent_where_no_reader_minds(
    examiner: Examiner, folder: str, operator: str, file: str, path: str, to: str
) -> None:
    readers = V4 if folder.startswith("paligemma/") else V5 if "/v5/" in folder else ALL  # who read the good folder
    said = _said(examiner, folder, operator, file, path, to)
    loud = {one.code: one.fails for one in said if any(concerns(one.fails, reader(version)) for version in readers)}
    assert loud == {}


@pytest.mark.parametrize(("folder", "operator", "file", "path", "to", "code", "minds"), OF_VLLM)
def test_it_says_whether_vllm_minds(
    examiner: Examiner, folder: str, operator: str, file: str, path: str, to: str, code: str, minds: bool
) -> None:
    found = [one for one in _said(examiner, folder, operator, file, path, to) if one.code == code]
    assert found
    assert any(concerns(one.fails, Reader("vllm", (0, 31), (5, 17))) for one in found) is minds
    assert any(concerns(one.fails, Reader("vllm")) for one in found) is minds


def test_live_names_are_read_by_vllm_but_for_those_of_a_tower(tmp_path: Path) -> None:
    """vLLM 0.31 answered as before with the former; of the latter: no parameter named 'vision_tower.embeddings'."""
    good = good_folder("llava/served/full")
    for outer in ("vision_tower.vision_model.", "vision_tower."):
        live = (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            (outer, "model.vision_tower."),
        )
        named = {_renamed(name, live): held for name, held in unpack(good[WEIGHTS]).items()}
        folder = write({**good, WEIGHTS: pack(named)}, tmp_path / outer)
        (found,) = (one for one in findings(folder, None) if one.code == "unpublished-names")
        assert concerns(found.fails, Reader("vllm", (0, 31), (5, 17))) is ("vision_model" in outer)
        assert concerns(found.fails, Reader("vllm", (0, 9), (4, 57)))


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


def test_a_padding_id_without_a_row_ends_a_batch_of_unlike_answers(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    folder = tmp_path / "checkpoint"
    shutil.copytree(base, folder)
    settings = json.loads((folder / GENERATION).read_text()) | {"pad_token_id": 9999}
    (folder / GENERATION).write_text(json.dumps(settings))

    def answers() -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
        asked = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False}
        first = model.generate(**asked, max_new_tokens=1, eos_token_id=None)[:, -1].tolist()
        assert first[0] != first[1]
        found: torch.Tensor = model.generate(**asked, max_new_tokens=4, eos_token_id=first[0])
        return found

    with pytest.raises(IndexError):
        answers()
    assert {"padding-beyond-rows"} == {one.code for one in diagnose_checkpoint(folder, base=base).findings}
    repair_checkpoint(folder, base=base)
    assert answers().shape == (2, 7)
