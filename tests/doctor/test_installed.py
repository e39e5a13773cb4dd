"""The text of the installed classes says what the classes themselves do."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import Version

from grpo_toolkit.doctor.installed_classes import class_source, default_in, makes_its_steps
from grpo_toolkit.doctor.installed_configs import installed_defaults, installed_takes

IS_NEW = Version(transformers.__version__) >= Version("5")
newest = pytest.mark.skipif(not IS_NEW, reason="4.x checks no types, and its tokenizers read every step")

VALUES: dict[str, list[Any]] = {
    "hidden_size": [8, "8", None, [8], True],
    "attention_dropout": [0.0, "0.0", None, [0.0]],
    "pad_token_id": [3, None, "3", [3]],
    "eos_token_id": [3, [3, 4], None, "3", ["3"]],
    "use_cache": [True, None, "true"],
    "rope_parameters": [None, "default", []],
    "hidden_act": ["silu", 7, None],
}


@newest
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("key", VALUES)
def test_what_a_config_takes_is_read_from_its_text(model_type: str, key: str) -> None:
    kind = transformers.CONFIG_MAPPING[model_type]
    for value in VALUES[key]:
        try:
            kind.from_dict({"model_type": model_type, key: value})
            is_taken = True
        except Exception as error:
            is_taken = "Field" not in type(error).__name__
        assert installed_takes(model_type, (), key, value) is is_taken, (model_type, key, value)


def test_defaults_are_those_of_the_part_that_is_asked_for() -> None:
    assert installed_defaults("clip_vision_model", ("vision_config",), "hidden_size") == (768,)
    assert installed_defaults("clip_text_model", ("text_config",), "hidden_size") == (512,)
    assert installed_defaults("llama", (), "hidden_size") == (transformers.LlamaConfig().hidden_size,)
    assert installed_defaults("no_such_model", (), "hidden_size") == ()


def test_what_a_processor_has_by_default() -> None:
    source = class_source("PixtralProcessor", "processing")
    assert default_in(source, "image_token") == "[IMG]"
    assert default_in(source, "no_such_key") is None
    assert class_source("NoSuchProcessor", "processing") == ""
    assert class_source("../x", "processing") == ""


@newest
def test_which_tokenizers_make_their_steps_themselves() -> None:
    assert makes_its_steps("qwen2_5_vl", "Qwen2Tokenizer")
    assert makes_its_steps("qwen2", "TokenizersBackend")  # a type for which the library trusts its own table
    assert not makes_its_steps("llama", "TokenizersBackend")
