"""The messages of docs/troubleshooting.md: the installed transformers says them, and the doctor finds their cause."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from safetensors.torch import load_file, save_file

from grpo_toolkit import diagnose_checkpoint
from scripts.models.base_variants import change_json, change_weights
from tests.support.models import build_llama, build_qwen2_5_vl
from tests.support.wild import build_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.stack
VERSION = Version(transformers.__version__)
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("messages") / "base")


def edited(file: str, **values: Any) -> Callable[[Path], None]:
    """Return a change that sets keys of a JSON file; ... deletes one."""

    def change(folder: Path) -> None:
        def edit(content: dict[str, Any]) -> None:
            content.update(values)
            for key in [key for key, value in values.items() if value is ...]:
                content.pop(key, None)

        change_json(folder, file, edit)

    return change


def written(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_text(text, encoding="utf-8"))


def void(_: object) -> None:
    return None


def with_bom(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def in_shards(folder: Path) -> dict[str, str]:
    """Put the weights into two shards without an index, and return what the index would say."""
    file = folder / "model.safetensors"
    weights, places = load_file(file), {}
    for number in (1, 2):
        shard = f"model-0000{number}-of-00002.safetensors"
        own = {name: weights[name] for name in sorted(weights)[number - 1 :: 2]}
        save_file(own, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(own, shard)
    file.unlink()
    return places


def without_metadata(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": in_shards(folder)}))


def without_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": in_shards(folder)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00002-of-00002.safetensors").unlink()


def placeholders(folder: Path) -> None:
    change_weights(folder, lambda held: {name: torch.zeros(0) for name in held})


def not_numbers(folder: Path) -> None:
    change_weights(folder, lambda held: {name: tensor * float("nan") for name, tensor in held.items()})


def template_in_the_tokenizer(folder: Path) -> None:
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    edited("tokenizer_config.json", chat_template=template)(folder)


def config_of_5(folder: Path) -> None:
    """Nest the text model's settings, and write its rotary ones in the form of transformers 5 alone."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    text = {key: value for key, value in content.items() if key not in OF_THE_WHOLE}
    rotary = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": rotary}
    whole = {key: content[key] for key in content if key in OF_THE_WHOLE}
    file.write_text(json.dumps({**whole, "text_config": text}))


OF_THE_WHOLE = {
    "architectures", "model_type", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version",
}  # fmt: skip
SIZE = {"min_pixels": 3136, "max_pixels": 12845056}
CUT = {"direction": "Right", "max_length": 24, "strategy": "LongestFirst", "stride": 0}
NO_CHAT_TEMPLATE = "this processor does not have a chat template."
# The change, the finding, and the message under versions of transformers.
CASES: dict[str, tuple[Callable[[Path], Any], str, dict[str, str]]] = {
    "list of special tokens": (
        edited("tokenizer_config.json", extra_special_tokens=["<|im_start|>"]),
        "extra-special-tokens-list",
        {"<5": "'list' object has no attribute 'keys'"},
    ),
    "tokenizer class of 5": (
        edited("tokenizer_config.json", tokenizer_class="TokenizersBackend"),
        "tokenizers-backend",
        {"<5": "Tokenizer class TokenizersBackend does not exist or is not currently imported."},
    ),
    "nested settings": (
        config_of_5,
        "nested-text-config",
        {"<4.52": "'dict' object has no attribute 'to_dict'"},
    ),
    "rotary settings of 5": (
        config_of_5,
        "rope-parameters-alone",
        {">=4.52,<5": "'NoneType' object is not subscriptable"},
    ),
    "dead pixel limits": (
        edited("preprocessor_config.json", size=SIZE, min_pixels=..., max_pixels=...),
        "pixel-limits-unread",
        {">=4.50": "must contain 'shortest_edge' and 'longest_edge' keys"},
    ),
    "unknown image processor": (
        edited("preprocessor_config.json", image_processor_type="Qwen2_5_VLImageProcessor"),
        "unknown-image-processor",
        {">=4": "Unrecognized image processor in "},
    ),
    "no image processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "processor-missing",
        {
            "<4.50": "does not appear to have a file named preprocessor_config.json",
            ">=4.57": "Can't load image processor for ",
        },
    ),
    "broken tokenizer": (
        written("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE2"}}'),
        "tokenizer-broken",
        {">=4": "data did not match any variant of untagged enum "},
    ),
    "special token without text": (
        edited("tokenizer_config.json", eos_token=5),
        "special-token-no-text",
        {">=4": "has to be either str or AddedToken but got: "},
    ),
    "no model type": (
        edited("config.json", model_type=...),
        "model-type-missing",
        {">=4": "Should have a model_type key in its config.json"},
    ),
    "unknown model type": (
        edited("config.json", model_type="qwen9_vl"),
        "model-type-unknown",
        {">=4": "Transformers does not recognize this architecture."},
    ),
    "unknown dtype": (
        edited("config.json", torch_dtype="bf16", dtype="bf16"),
        "dtype-unknown",
        {">=4": "module 'torch' has no attribute 'bf16'"},
    ),
    "byte-order mark": (with_bom, "byte-order-mark", {">=4": "is not a valid JSON file."}),
    "cut off": (cut_off, "unreadable-file", {">=4": "incomplete metadata, file not fully covered"}),
    "index without metadata": (without_metadata, "index-incomplete", {">=4": "KeyError: 'metadata'"}),
    "no index": (in_shards, "weights-unnamed", {">=4": "Error no file named "}),
    "no shard": (without_a_shard, "shard-missing", {">=4": "model-00002-of-00002.safetensors"}),
    "placeholders": (
        placeholders,
        "empty-tensors",
        {
            "<5": "copying a param with shape torch.Size([0]) from checkpoint",
            ">=5": "You set ignore_mismatched_sizes to False",
        },
    ),
    "empty template": (
        written("chat_template.json", "{}"),
        "chat-template-json-empty",
        {">=4": "KeyError: 'chat_template'"},
    ),
    "template in the tokenizer": (
        template_in_the_tokenizer,
        "template-in-tokenizer-alone",
        {"<4.50": "No chat template is set for this processor.", ">=4.57": NO_CHAT_TEMPLATE},
    ),
    "tokenizer that cuts": (
        lambda folder: change_json(folder, "tokenizer.json", lambda content: content.update(truncation=CUT)),
        "tokenizer-cuts",
        {
            "<4.50": "Image features and image tokens do not match: tokens: 0,",
            ">=4.57": "Mismatch in image token count between text and input_ids.",
        },
    ),
    "no numbers": (
        not_numbers,
        "values-not-finite",
        {">=4": "probability tensor contains either inf, nan or element < 0"},
    ),
}


def messages_of(folder: Path) -> Iterator[str]:
    """Yield what the library raises, part by part, as a traceback ends."""
    from PIL import Image

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it? " * 20}]}]
    inputs: Any = {"input_ids": torch.arange(1, 9)[None]}
    try:
        transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the library raises is what a user sees
        yield f"{type(error).__name__}: {error}"
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], images=[Image.new("RGB", (112, 84))], return_tensors="pt")
    except Exception as error:
        yield f"{type(error).__name__}: {error}"
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        model.generate(**inputs, max_new_tokens=2, do_sample=True)
    except Exception as error:
        yield f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_the_message_is_on_the_page_beside_its_finding(name: str, base: Path, tmp_path: Path) -> None:
    change, code, messages = CASES[name]
    folder = shutil.copytree(base, tmp_path / "folder")
    change(folder)
    assert code in {finding.code for finding in diagnose_checkpoint(folder, deep=True).findings}
    rows = [line for line in PAGE.splitlines() if f"(reference/findings.md#{code})" in line]
    for versions, message in messages.items():
        assert any(message in row.replace("`", "").replace("\\", "") for row in rows), message
        if VERSION in SpecifierSet(versions):
            raised = re.sub(r"[`\n]", "", "\n".join(messages_of(folder)))
            assert message in raised


ADAPTERS = {
    "compiled adapter": ("adapter-names-wrapped", "Found missing adapter keys while loading the checkpoint"),
    "MLX adapter": ("adapter-of-mlx", "KeyError: 'peft_type'"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_says_of_an_adapter_is_on_the_page(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    code, message = ADAPTERS[name]
    base = build_llama(tmp_path / "base")
    folder = build_report(name, base, tmp_path / "adapter")
    assert code in {finding.code for finding in diagnose_checkpoint(folder, base=base).findings}
    assert any(message in row.replace("`", "") for row in PAGE.splitlines() if f"#{code})" in row)
    said = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
        except KeyError as error:
            said.append(f"KeyError: {error}")
    assert message in "\n".join([*said, *(str(one.message) for one in warned)])
