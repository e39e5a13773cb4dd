"""The random models of published shapes: what is written is what the libraries read, on every stack."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.model.load import load_model
from scripts.models.random_vlm import EMBEDDING_ROWS, SHAPES, OutputError, make_random_vlm, tensor_shapes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

SCRIPT = "scripts.models.random_vlm"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_vlm("tiny", tmp_path_factory.mktemp("random") / "tiny", shard_bytes=1_000_000)


# Counted on the models of these shapes; the published sizes are given as 3.75 and 8.29 billion.
@pytest.mark.parametrize(
    ("shape", "parameters", "tensors"), [("qwen2.5-vl-3b", 3_754_622_976, 824), ("qwen2.5-vl-7b", 8_292_166_656, 729)]
)
def test_the_published_shapes_have_the_published_number_of_parameters(
    shape: str, parameters: int, tensors: int
) -> None:
    shapes = tensor_shapes(SHAPES[shape], vocab_size=EMBEDDING_ROWS[shape])
    assert (sum(math.prod(dims) for dims in shapes.values()), len(shapes)) == (parameters, tensors)
    assert ("lm_head.weight" in shapes) == (not SHAPES[shape].tie_word_embeddings)


def test_it_loads_whole_in_this_library_and_answers(tiny: Path) -> None:
    import torch
    from PIL import Image

    model, processor, report = load_model(tiny)
    assert report.is_clean
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.new("RGB", (56, 56), (9, 80, 200))], return_tensors="pt")
    assert (inputs["input_ids"] == 151655).sum() == 4
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.isfinite(logits).all()
    assert logits.float().std() > 0.1
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_the_tokenizer_has_the_published_size_and_ids_and_loses_nothing(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|file_sep|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [151643, 151644, 151645, 151652, 151655, 151664]
    assert len(tokenizer) == 151_665
    text = "How many? <think>émigré 東京 \U0001f600</think><answer>12.5</answer>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_it_is_sharded_and_the_same_seed_gives_the_same_bytes_whatever_the_threads(tiny: Path, tmp_path: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = sorted(tiny.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2
    again = make_random_vlm("tiny", tmp_path / "again", shard_bytes=1_000_000, threads=1)
    other = make_random_vlm("tiny", tmp_path / "other", shard_bytes=1_000_000, seed=1)
    for file in files:
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert (other / files[0].name).read_bytes() != files[0].read_bytes()


def test_the_files_are_in_the_published_form(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    assert "text_config" not in config
    assert (config["vocab_size"], config["torch_dtype"]) == (151_936, "bfloat16")
    assert json.loads((tiny / "generation_config.json").read_text())["eos_token_id"] == [151645, 151643]
    assert json.loads((tiny / "preprocessor_config.json").read_text())["max_pixels"] == 12845056
    assert "model.layers.0.self_attn.q_proj.weight" in open_checkpoint(tiny).tensors()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        make_random_vlm("tiny", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", SCRIPT, "--shape", "tiny", tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("random_vlm: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
