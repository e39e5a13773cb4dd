"""Requests as inputs: pictures for the processor, text for the tokenizer, whatever the processor says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.request import Request, plain_request
from grpo_toolkit.model.load import load_model, load_processor
from scripts.models.families import build_family
from tests.support.training import v5_only

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack


@pytest.fixture
def paligemma() -> Any:
    """A processor that refuses to be called without a picture."""
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    from scripts.models.tiny_bases import byte_tokenizer

    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    return PaliGemmaProcessor(image_processor, byte_tokenizer(extra=["<image>"]))


@v5_only  # before, its tokenizer had to be a GemmaTokenizer
def test_text_alone_needs_no_picture(paligemma: Any) -> None:
    with pytest.raises(ValueError, match="images"):
        paligemma(text=["What is this?"], return_tensors="pt")
    inputs = prepare_inputs(paligemma, [plain_request()])
    assert "Count from one to ten." in paligemma.tokenizer.decode(inputs["input_ids"][0])
    both = prepare_inputs(paligemma, [plain_request(), Request(messages=[{"role": "user", "content": "?"}])])
    assert both["input_ids"].shape == both["attention_mask"].shape == (2, inputs["input_ids"].shape[1])


@v5_only
def test_text_has_the_token_types_that_its_processor_makes(tmp_path: Path) -> None:
    """Without them PaliGemma's prompt, and all that follows, is seen in both directions, but not through a cache."""
    import torch

    model, processor, _ = load_model(build_family("paligemma", tmp_path / "base"))
    made = prepare_inputs(processor, [plain_request()])
    assert made["token_type_ids"].equal(torch.zeros_like(made["input_ids"]))
    by_itself = processor.tokenizer(processor.tokenizer.decode(made["input_ids"][0]), return_tensors="pt")
    assert by_itself.keys() == {"input_ids", "attention_mask"}
    asked: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    apart = {}
    for name, inputs in (("as the processor", made), ("without types", by_itself)):
        cached, uncached = (
            model.generate(**inputs, use_cache=use, return_dict_in_generate=True, **asked).logits
            for use in (True, False)
        )
        apart[name] = max(float((one - other).abs().max()) for one, other in zip(cached, uncached, strict=True))
    assert apart["as the processor"] < 1e-4
    assert apart["without types"] > 1e-2


def test_a_processor_and_its_tokenizer_make_the_same_of_text(qwen: Path) -> None:
    processor = load_processor(qwen)
    whole, part = (prepare_inputs(one, [plain_request()]) for one in (processor, processor.tokenizer))
    assert whole.keys() == part.keys() == {"input_ids", "attention_mask"}
    assert whole["input_ids"].equal(part["input_ids"])


def test_a_picture_goes_to_the_processor(qwen: Path, image_request: Request) -> None:
    assert "pixel_values" in prepare_inputs(load_processor(qwen), [image_request])
