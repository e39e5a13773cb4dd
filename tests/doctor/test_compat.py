"""Exports that older versions and servers read: whatever the base was written by.

`tests/data/exports` has what this package exports under transformers 5.23, of a base in published form and of one that
transformers 5 wrote. Every stack loads them here, with weights that depend on nothing but their names, so the logits
are the same numbers everywhere. Run on every stack: `bash scripts/test all`.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from grpo_toolkit import diagnose_checkpoint, export_model, merge_adapter
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.cli import main
from grpo_toolkit.doctor.compat import write_older_forms
from grpo_toolkit.errors import InputError
from grpo_toolkit.export.verify import verify_export
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.load import load_model
from scripts.models.base_variants import build_text_base, change_json
from tests.support.faulty import DATA, fill, randomize, unpack
from tests.support.models import build_qwen2_5_vl
from tests.support.served import VLLM_PARAMETERS, VLLM_PREFIXES, VLLM_PREFIXES_OF_OLD, VLLM_STACKED
from tests.support.training import v5_only

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.generation.request import Request

pytestmark = pytest.mark.stack

WEIGHTS = "model.safetensors"
TOKENS = [133, 262, 201, 162, 162, 162, 162, 162]
LOGITS = [-0.10873, -0.35417, -0.72749, 0.03664, -1.21292, 0.93442]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("bases") / "published")


@pytest.fixture(scope="module")
def saved(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that this library wrote in its own form."""
    folder = tmp_path_factory.mktemp("bases") / "saved"
    model, processor, _ = load_model(published)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["of_published_base", "of_v5_base"])
def test_an_export_made_under_transformers_5_has_the_same_logits_everywhere(
    name: str, published: Path, tmp_path: Path, image_request: Request
) -> None:
    folder = randomize(fill(unpack(f"exports/{name}", tmp_path / "export"), published))
    model, processor, report = load_model(folder)
    assert report.is_clean, report
    record = generate(model, processor, image_request)
    assert record.is_cached
    assert record.vision_calls == 1
    assert record.tokens == TOKENS
    with torch.no_grad():
        logits = model(**prepare_inputs(processor, [image_request])).logits[0, -1]
    assert logits[:6].tolist() == pytest.approx(LOGITS, abs=1e-4)


@pytest.mark.skipif(not transformers.__version__.startswith("5.23"), reason="what 5.23 writes is in tests/data")
def test_the_exports_of_today_are_those_that_every_stack_is_tested_with(
    published: Path, saved: Path, tmp_path: Path
) -> None:
    from scripts.models.faulty_checkpoints import cut

    for name, base in (("of_published_base", published), ("of_v5_base", saved)):
        export = export_model(base, tmp_path / name, verify=False).path
        (export / "grpo_toolkit.json").unlink()
        cut(export, tmp_path / "cut", export)
        found, kept = (
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (tmp_path / "cut", DATA / "exports" / name)
        )
        assert found.keys() == kept.keys()
        assert [file for file in found if found[file] != kept[file]] == []


@v5_only
def test_a_base_that_transformers_5_wrote_is_made_portable_and_that_is_said(saved: Path, tmp_path: Path) -> None:
    assert not diagnose_checkpoint(saved).is_clean
    result = export_model(saved, tmp_path / "export")
    assert result.made_portable == (
        "config.json: text settings nested where the family is published flat; now: the text model's keys moved to "
        "the top, as published",
        "config.json: rotary settings in the form of transformers 5 alone; now: rope_scaling and rope_theta written "
        "beside it",
        "tokenizer_config.json: extra_special_tokens is a list; now: moved to additional_special_tokens, which all "
        "versions read",
        "processor_config.json: image processor inside processor_config.json; now: the nested processors moved into "
        "files of their own",
    )
    config = json.loads((result.path / "config.json").read_text())
    assert config["rope_scaling"]["mrope_section"] == config["rope_parameters"]["mrope_section"] == [2, 1, 1]
    assert config["rope_theta"] == 1000000.0
    assert (result.path / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert diagnose_checkpoint(result.path).is_clean
    manifest = json.loads((result.path / "grpo_toolkit.json").read_text())
    assert manifest["made_portable"] == list(result.made_portable)
    assert result.verification is not None
    assert result.verification.passed


@v5_only
def test_those_who_want_only_the_new_form_get_the_bases_files(saved: Path, tmp_path: Path) -> None:
    assert main(["export", str(saved), str(tmp_path / "export"), "--compat", "v5", "--no-verify"]) == 0
    for path in saved.iterdir():
        assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="compat 'v4': not one of all, v5"):
        export_model(saved, tmp_path / "other", compat="v4")


@v5_only
def test_what_training_changed_in_a_published_base_is_written_in_older_forms_too(
    published: Path, tmp_path: Path
) -> None:
    model, processor, _ = load_model(published)
    processor.tokenizer.add_tokens(["<box>"])
    result = export_model(model, tmp_path / "export", processing_class=processor)
    tokenizer = json.loads((result.path / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    assert "image_processor_type" in json.loads((result.path / "preprocessor_config.json").read_text())
    assert diagnose_checkpoint(result.path).is_clean
    assert load_model(result.path)[1].tokenizer.convert_tokens_to_ids("<box>") == processor.tokenizer.vocab["<box>"]


def live_named(base: Path, folder: Path) -> Path:
    """The base with the tensor names of the live model since 4.52, as a hand-written save leaves them."""
    shutil.copytree(base, folder)
    live = {}
    for name, tensor in load_file(base / WEIGHTS).items():
        prefix = "model." if name.startswith("visual.") else "model.language_model."
        live[prefix + name.removeprefix("model.")] = tensor
    save_file(live, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@v5_only
@pytest.mark.parametrize("way", ["copied", "saved", "merged", "merge"])
def test_tensor_names_are_the_published_ones_whatever_the_base_has(way: str, published: Path, tmp_path: Path) -> None:
    from tests.merge.test_merge import make_adapter

    base, output = live_named(published, tmp_path / "base"), tmp_path / "export"
    adapter = make_adapter(published, tmp_path / "adapter", target_modules=["q_proj"])
    if way == "merge":
        merge_adapter(adapter, output, base=base)
        assert verify_export(output, base=base).passed
    else:
        model, processor, _ = load_model(base)
        source: Any = {"copied": base, "saved": model, "merged": adapter}[way]
        result = export_model(source, output, base=base, processing_class=processor)
        assert result.verification is not None
        assert result.verification.passed
    found, original = load_file(output / WEIGHTS), load_file(published / WEIGHTS)
    assert found.keys() == original.keys()
    changed = {name for name in found if not found[name].equal(original[name])}
    assert changed == ({name for name in found if "q_proj.weight" in name} if way.startswith("merge") else set())
    export_model(base, tmp_path / "new", compat="v5", verify=False)
    assert open_checkpoint(tmp_path / "new").tensors().keys() == load_file(base / WEIGHTS).keys()


@pytest.mark.parametrize("prefixes", [VLLM_PREFIXES, VLLM_PREFIXES_OF_OLD])
@pytest.mark.parametrize("tied", [True, False])
def test_vllm_finds_a_parameter_for_every_tensor_and_a_tensor_for_every_parameter(
    tied: bool, prefixes: dict[str, str], published: Path, tmp_path: Path
) -> None:
    base = published
    if not tied:
        base = tmp_path / "untied"
        shutil.copytree(published, base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        weights = load_file(base / WEIGHTS)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
        save_file(weights, base / WEIGHTS, metadata={"format": "pt"})
    model, processor, _ = load_model(base)
    exported = open_checkpoint(export_model(model, tmp_path / "export", processing_class=processor).path).tensors()
    loaded: dict[str, set[str]] = {}
    for name in exported:
        for old, new in prefixes.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        part = "whole"
        for parameter, stored, piece in VLLM_STACKED:
            if stored in name:
                name, part = name.replace(stored, parameter), piece
                break
        loaded.setdefault(name, set()).add(part)
    expected = {
        re.sub(r"\bN\b", str(layer), name): set(parts)
        for name, parts in VLLM_PARAMETERS.items()
        for layer in range(2 if re.search(r"\bN\b", name) else 1)
        if not (tied and "lm_head" in name)
    }
    assert loaded == expected


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_tokenizer_that_transformers_5_wrote_makes_what_generate_takes(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_text_base(family, tmp_path / "folder")
    change_json(folder, "tokenizer_config.json", lambda config: config.update(tokenizer_class="TokenizersBackend"))
    change_json(folder, "tokenizer_config.json", lambda config: config.pop("model_input_names", None))
    write_older_forms(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("What is this?", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    answer = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=2)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_what_a_tokenizer_says_of_its_inputs_stays(tmp_path: Path) -> None:
    folder = build_text_base("Llama", tmp_path / "folder")
    own = {"tokenizer_class": "TokenizersBackend", "model_input_names": ["input_ids"]}
    change_json(folder, "tokenizer_config.json", lambda config: config.update(own))
    write_older_forms(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_input_names"] == ["input_ids"]
