"""Loading by real readers: adapters in the forms that trainers leave, and what stays unfilled."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, ProcessorMixin

from grpo_toolkit.latency.engines.arms import Arm, processor_of
from grpo_toolkit.model.load import auto_class, load_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

pytestmark = pytest.mark.stack
VERSION = Version(transformers.__version__)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter with trained factors on the text model of the Qwen2.5-VL base."""
    model = auto_class(base).from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "init_lora_weights": True}))
    return tmp_path / "adapter"


def second_factors(model: Any) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_parameters() if "lora_B" in name]


def test_a_tokenizer_alone_is_put_into_the_processor_of_the_base(adapter: Path, base: Path) -> None:
    """The adapter of a text-only training of a vision-language model: AutoProcessor refuses the adapter's folder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(adapter)
    for processor in (load_model(adapter, base=base)[1], processor_of([Arm(name="trained", path=adapter)])):
        assert isinstance(processor, ProcessorMixin)
        assert "<think>" in processor.tokenizer.get_vocab()
        assert processor.image_processor is not None


def test_a_factor_that_is_renamed_as_it_is_loaded_is_not_missing(adapter: Path, base: Path, tmp_path: Path) -> None:
    older = shutil.copytree(adapter, tmp_path / "older")
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {name: name.replace("model.language_model.layers.", "model.layers.") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, older / "adapter_model.safetensors")
    model, _, report = load_model(older, base=base)
    filled = [bool(tensor.any()) for tensor in second_factors(model)]
    assert filled
    assert all(filled) is (Version("5") > VERSION)  # PEFT renames them on 4.x
    assert (report.missing == []) is all(filled)
