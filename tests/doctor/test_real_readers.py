"""The kinds of faults that people reported, held against what the installed transformers really does with them.

Each folder is made of the tiny base; the fault is shown with the reader itself, then the finding, then the cure.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file

from grpo_toolkit import diagnose_checkpoint, export_model, repair_checkpoint, verify_export
from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import DIALECT_CODES
from grpo_toolkit.doctor.readers import installed_reader, parse_reader
from grpo_toolkit.errors import CheckpointError, WorkerError
from grpo_toolkit.model.load import load_model, load_processor
from scripts.models.tiny_bases import build_llama, build_llava

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.stack
FORMS = DIALECT_CODES - {"pixel-limits-unread"}
VERSION = Version(transformers.__version__)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the Qwen2.5-VL base, to be made ill."""
    return shutil.copytree(base, tmp_path / "folder")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava(tmp_path_factory.mktemp("llava") / "base")


def edit(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None deletes one."""
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def codes(folder: Path, base: Path | None = None, **options: Any) -> list[str]:
    """Return the findings but notes and the forms of the release that wrote the base."""
    findings = diagnose_checkpoint(folder, base=base, **options).findings
    return [found.code for found in findings if found.severity.value != "note" and found.code not in FORMS]


def failed(folder: Path, base: Path | None = None) -> str:
    """Return what `verify` says is wrong."""
    try:
        return "; ".join(check.detail for check in verify_export(folder, base=base).failures)
    except WorkerError as error:
        return str(error)


def test_pixel_limits_that_no_reader_takes(folder: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (400, 400))
    limited = {"min_pixels": 3136, "max_pixels": 12544}
    edit(folder / "preprocessor_config.json", size={"shortest_edge": 3136, "longest_edge": 12544}, **limited)
    base = shutil.copytree(folder, tmp_path / "base")
    patches = len(load_processor(base).image_processor(images=picture, return_tensors="pt")["pixel_values"])
    assert patches == 64
    edit(folder / "preprocessor_config.json", size=limited, min_pixels=None, max_pixels=None)

    if Version("4.50") > VERSION:  # other limits, and nothing is said
        processor = load_processor(folder).image_processor
        assert len(processor(images=picture, return_tensors="pt")["pixel_values"]) != patches
    else:
        with pytest.raises((ValueError, AttributeError, TypeError, KeyError)):
            load_processor(folder).image_processor(images=picture, return_tensors="pt")
    assert "pixel-limits-unread" in codes(folder)
    assert "pixel-limits-unread" in failed(folder)

    with pytest.raises(CheckpointError, match=r"pixel-limits-unread.*grpo-toolkit repair"):
        export_model(folder, tmp_path / "export", base=base)
    repair_checkpoint(folder)
    assert codes(folder) == []
    export_model(folder, tmp_path / "export", base=base)
    for good in (folder, tmp_path / "export"):
        processor = load_processor(good).image_processor
        assert len(processor(images=picture, return_tensors="pt")["pixel_values"]) == patches


def test_an_image_processor_in_two_files(folder: Path) -> None:
    """As ms-swift leaves it: the file of transformers 5, and the base's preprocessor_config.json beside it."""
    image = json.loads((folder / "preprocessor_config.json").read_text())
    outer = {"image_processor": image, "processor_class": image["processor_class"]}
    (folder / "processor_config.json").write_text(json.dumps(outer))
    (finding,) = (one for one in diagnose_checkpoint(folder).findings if one.code == "preprocessor-config-missing")
    assert finding.concerns(parse_reader("transformers==4.55"))
    assert not finding.concerns(parse_reader("transformers==4.56"))
    if finding.concerns(installed_reader()):
        with pytest.raises(TypeError, match=r"argument '?image_processor"):
            load_processor(folder)
    else:
        assert load_processor(folder).image_processor.patch_size == image["patch_size"]
    repair_checkpoint(folder)
    assert "preprocessor-config-missing" not in {one.code for one in diagnose_checkpoint(folder).findings}
    assert load_processor(folder).image_processor.patch_size == image["patch_size"]


def test_a_config_beside_an_adapter(llama: Path, tmp_path: Path) -> None:
    """As axolotl leaves it: the config of the model in training, with the cache off."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    get_peft_model(load_model(llama)[0], LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    settings = json.loads((llama / "config.json").read_text()) | {"use_cache": False}
    (folder / "config.json").write_text(json.dumps(settings))
    (finding,) = diagnose_checkpoint(folder, base=llama).findings
    assert finding.code == "adapter-beside-config"
    assert not finding.concerns(parse_reader("transformers==5.3"))
    if finding.concerns(installed_reader()):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
    else:  # its cache is the base's
        assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True
    repair_checkpoint(folder, base=llama)
    assert diagnose_checkpoint(folder, base=llama).is_clean
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True


def test_an_end_that_generation_config_does_not_say(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "folder")
    right = load_model(llama)[0].generation_config.eos_token_id
    edit(folder / "generation_config.json", eos_token_id=None, pad_token_id=None)
    edit(folder / "config.json", eos_token_id=right)
    assert load_model(folder)[0].generation_config.eos_token_id is None  # config.json is not asked
    assert codes(folder) == codes(folder, llama) == ["eos-token-lost"]
    assert "eos-token-lost" in failed(folder)
    assert diagnose_checkpoint(folder, reader="vllm").is_clean  # vLLM stops at the tokenizer's own end
    repair_checkpoint(folder, base=llama)
    assert load_model(folder)[0].generation_config.eos_token_id == right
    assert codes(folder) == []


def test_shards_that_no_index_names(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):
        load_model(folder)
    assert codes(folder) == ["weights-unnamed"]
    assert "weights-unnamed" in failed(folder)
    with pytest.raises(CheckpointError, match=r"weights-unnamed.*grpo-toolkit repair"):
        export_model(folder, folder.parent / "out")
    repair_checkpoint(folder)
    assert codes(folder) == []
    model, _, report = load_model(folder)
    assert report.is_clean
    assert torch.equal(model.get_input_embeddings().weight, whole["model.embed_tokens.weight"])

    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    (finding,) = (f for f in diagnose_checkpoint(folder).findings if f.code == "weights-unnamed")
    assert not finding.repairable  # an index would not make it whole


def test_ids_that_have_no_row(folder: Path) -> None:
    model, processor, _ = load_model(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([f"<step{n}>" for n in range(rows - len(tokenizer) + 2)])
    tokenizer.save_pretrained(folder)
    last = max(tokenizer.get_vocab().values())
    assert last >= rows
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[last]]))
    assert "ids-beyond-rows" in codes(folder)
    assert f"up to {last}" in str(next(f.found for f in diagnose_checkpoint(folder).findings if "ids" in f.code))
    assert "ids-beyond-rows" in failed(folder)


def test_a_placeholder_that_only_the_config_names_is_looked_up_nowhere(folder: Path, image_request: Any) -> None:
    """A tokenizer without videos leaves the class's default, an id of the large vocabulary, in the config."""
    edit(folder / "config.json", video_token_id=151656)
    _, _, report = load_model(folder)
    assert report.is_clean
    assert verify_export(folder, requests=[image_request]).passed
    assert codes(folder) == []
    edit(folder / "config.json", pad_token_id=151656)  # every padded batch has it
    assert codes(folder) == ["ids-beyond-rows"]


def test_code_that_was_not_copied(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = shutil.copytree(llama, tmp_path / "folder"), shutil.copytree(llama, tmp_path / "base")
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    for one in (folder, base):
        edit(one / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=own)
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nraise RuntimeError\n"
    for name in ("configuration_own.py", "modeling_own.py", "helper.py"):
        (base / name).write_text(code)

    def ask(*_: object) -> str:
        raise AssertionError("a question about remote code")

    monkeypatch.setattr("builtins.input", ask)
    assert codes(folder) == ["code-missing"]
    for one in (folder, base):  # without its code, and with it
        assert main(["verify", str(one)]) in (1, 2)
        assert main(["export", str(one), str(tmp_path / "out")]) == 2
        with pytest.raises((ValueError, OSError)):
            load_model(one)
    assert not marker.exists()
    repair_checkpoint(folder, base=base)
    assert (folder / "helper.py").read_text() == code
    assert codes(folder, base) == []
    assert not marker.exists()


def test_a_text_class_over_a_multimodal_models_weights(tmp_path: Path, llava: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "folder")
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit(folder / "config.json", vision_config=None, text_config=None)
    edit(folder / "config.json", **{**text, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    report = load_model(folder)[2]
    assert len(report.missing) > 10
    assert "class-does-not-fit" in codes(folder)
    assert "class-does-not-fit" in failed(folder)
    assert max(len(check.detail) for check in verify_export(folder).failures) < 700
    repair_checkpoint(folder, base=llava)
    assert load_model(folder)[2].is_clean
    assert codes(folder, llava) == []


@pytest.mark.parametrize(("fill", "code"), [(torch.zeros_like, "tensors-empty"), (torch.ones_like, "tensors-empty"),
                                            (lambda t: t * float("nan"), "values-not-finite")])  # fmt: skip
def test_tensors_without_information(
    fill: Callable[[torch.Tensor], torch.Tensor], code: str, folder: Path, base: Path, tmp_path: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    dead = [name for name in weights if ".layers.1." in name]
    save_file({**weights, **{name: fill(weights[name]) for name in dead}}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert codes(folder) == []  # no weight is read
    for beside in (None, base):
        assert code in codes(folder, beside, deep=True)
    assert code in failed(folder)
    assert main(["export", str(folder), str(tmp_path / "out"), "--base", str(base)]) == 1
    assert not (tmp_path / "out").exists()
    assert not {"tensors-empty", "values-not-finite"} & set(codes(base, deep=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norms_of_ones_are_as_made_and_zeros_are_not(dtype: torch.dtype, folder: Path, base: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    norm = "model.layers.0.input_layernorm.weight"
    assert weights[norm].eq(1).all()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "tensors-empty" not in codes(folder, base, deep=True)
    save_file({**weights, norm: weights[norm] * 0}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "tensors-empty" in codes(folder, base, deep=True)


def test_tied_ends_that_were_trained_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_model(folder)[0]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert "adapter-unties" in codes(tmp_path / "adapter", folder)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(folder)]) == 2
    assert "ties to its other end" in capsys.readouterr().err  # not: "is it this adapter's base?"
    assert not (tmp_path / "out").exists()
