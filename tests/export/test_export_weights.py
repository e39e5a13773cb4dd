"""A full model's export from its folder: files copied or linked where they fit, put right on the way where not."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.checkpoint.weights.copy_weights import plan_copy
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, VerificationError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.model.load import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.shard_writer import Shard

WEIGHTS = "model.safetensors"


@pytest.fixture
def trained(qwen: Path, tmp_path: Path) -> Path:
    """A full checkpoint of the tiny Qwen2.5-VL: other weights, the same files."""
    folder = tmp_path / "trained"
    shutil.copytree(qwen, folder)
    torch.manual_seed(1)
    weights = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the model was loaded or saved")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", never)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", never)


def test_a_folder_is_copied_and_not_loaded(qwen: Path, trained: Path, tmp_path: Path, never_loaded: None) -> None:
    result = export_model(trained, tmp_path / "export", base=qwen, verify=False)
    assert (result.path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert (result.path / WEIGHTS).stat().st_ino != (trained / WEIGHTS).stat().st_ino
    for name in ("config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (result.path / name).read_bytes() == (qwen / name).read_bytes()


def test_a_folder_that_is_copied_is_verified_all_the_same(qwen: Path, trained: Path, tmp_path: Path) -> None:
    result = export_model(trained, tmp_path / "export", base=qwen)
    assert (result.path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert result.verification is not None
    assert result.verification.passed


def test_an_adapter_is_exported_without_loading_anything(
    qwen: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from tests.merge.test_merge import make_adapter

    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    request.getfixturevalue("never_loaded")
    result = export_model(adapter, tmp_path / "export", verify=False)
    assert result.base == qwen
    assert not load_file(result.path / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"].equal(
        load_file(qwen / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"]
    )


def test_headers_are_read_once(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.merge.test_merge import make_adapter

    read: list[Path] = []

    def reading(path: Path, **options: Any) -> dict[str, TensorInfo]:
        read.append(path)
        return read_safetensors_header(path, **options)

    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr("grpo_toolkit.checkpoint.folders.model_folder.read_safetensors_header", reading)
    export_model(adapter, tmp_path / "export")
    assert read.count(qwen / WEIGHTS) == 1
    assert [path.name for path in read if path.parent not in (qwen, adapter)] == [WEIGHTS]  # the export's own


def test_a_link_costs_nothing_and_leaves_its_source_alone(qwen: Path, trained: Path, tmp_path: Path) -> None:
    (trained / WEIGHTS).chmod(0o640)
    export = tmp_path / "export"
    assert main(["export", str(trained), str(export), "--base", str(qwen), "--link", "--no-verify"]) == 0
    assert (export / WEIGHTS).stat().st_ino == (trained / WEIGHTS).stat().st_ino
    assert (trained / WEIGHTS).stat().st_mode & 0o777 == 0o640
    assert (export / "config.json").stat().st_nlink == 1
    before = (trained / WEIGHTS).read_bytes()
    shutil.rmtree(export)
    assert (trained / WEIGHTS).read_bytes() == before


def test_what_cannot_be_linked_is_copied(
    qwen: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    result = export_model(trained, tmp_path / "export", base=qwen, verify=False, link=True)
    assert (result.path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert (result.path / WEIGHTS).stat().st_nlink == 1


def test_names_dtypes_and_a_head_stored_twice_are_put_right_on_the_way(
    trained: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from tests.support.models import build_qwen2_5_vl

    base = build_qwen2_5_vl(tmp_path / "base", dtype="bfloat16")
    weights = load_file(trained / WEIGHTS)
    live = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in weights.items()
    }
    live["lm_head.weight"] = live["model.language_model.embed_tokens.weight"].clone()
    save_file(live, trained / WEIGHTS, metadata={"format": "pt"})
    request.getfixturevalue("never_loaded")
    result = export_model(trained, tmp_path / "export", base=base, verify=False)
    found, wanted = open_checkpoint(result.path).tensors(), open_checkpoint(base).tensors()
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}
    for name, tensor in load_file(result.path / WEIGHTS).items():
        assert tensor.equal(weights[name].to(torch.bfloat16)), name


def test_a_head_of_its_own_is_not_dropped(qwen: Path, trained: Path, tmp_path: Path) -> None:
    def planned(folder: Path) -> list[Shard] | None:
        return plan_copy(folder, open_checkpoint(folder).tensors(), open_base(open_checkpoint(qwen)))

    weights = load_file(trained / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, trained / WEIGHTS, metadata={"format": "pt"})
    assert planned(trained) is None
    assert [shard.file for shard in planned(qwen) or ()] == [WEIGHTS]


def test_values_that_the_dtype_cannot_hold_are_refused(qwen: Path, trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    save_file({n: t.half() for n, t in load_file(qwen / WEIGHTS).items()}, base / WEIGHTS, metadata={"format": "pt"})
    weights = load_file(trained / WEIGHTS)
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, trained / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model.norm.weight has values that are not finite in torch.float16"):
        export_model(trained, tmp_path / "export", base=base, verify=False)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("is_live", [True, False])
def test_files_of_a_given_size(is_live: bool, qwen: Path, tmp_path: Path) -> None:
    source, processor = load_model(qwen)[:2] if is_live else (qwen, None)
    result = export_model(source, tmp_path / "export", processing_class=processor, max_shard_size=60_000, verify=False)
    files = open_checkpoint(result.path).weight_files()
    assert len(files) > 2
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    expected = load_file(qwen / WEIGHTS)
    assert index["weight_map"].keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for file in files for name, tensor in load_file(file).items())
    assert load_model(result.path)[2].is_clean


def test_a_vocabulary_that_was_resized_is_still_exported(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    size = model.get_input_embeddings().weight.shape[0] + 8
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "resized")
    processor.save_pretrained(tmp_path / "resized")
    result = export_model(tmp_path / "resized", tmp_path / "export", base=qwen, verify=False)
    assert load_file(result.path / WEIGHTS)["model.embed_tokens.weight"].shape[0] == size


def test_a_wrong_size_is_wrong_use(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-shard-size 5 apples"):
        export_model(qwen, tmp_path / "export", max_shard_size="5 apples", verify=False)


@pytest.mark.parametrize("way", ["live", "folder", "adapter", "merge"])
def test_a_dtype_of_ones_own(way: str, qwen: Path, tmp_path: Path) -> None:
    from tests.merge.test_merge import make_adapter

    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(qwen / WEIGHTS).items()}
    mixed["visual.merger.counts"] = torch.arange(4)
    save_file(mixed, base / WEIGHTS, metadata={"format": "pt"})
    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    output = tmp_path / "export"
    if way == "merge":
        assert main(["merge", str(adapter), str(output), "--base", str(base), "--dtype", "float16"]) == 0
    elif way == "live":
        del mixed["visual.merger.counts"]
        save_file(mixed, base / WEIGHTS, metadata={"format": "pt"})
        model, processor, _ = load_model(base)
        result = export_model(model, output, processing_class=processor, dtype="float16")
        assert result.verification is not None
        assert result.verification.passed
        detail = next(check.detail for check in result.verification.checks if check.name == "loads whole")
        assert "in float16" in detail
    else:
        export_model({"folder": base, "adapter": adapter}[way], output, base=base, dtype="torch.float16", verify=False)
    found = load_file(output / WEIGHTS)
    assert found.keys() == mixed.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float16 if mixed[name].is_floating_point() else torch.int64)
        if "q_proj.weight" not in name or way in ("live", "folder"):
            assert tensor.equal(mixed[name].to(tensor.dtype)), name
        else:
            assert not tensor.equal(mixed[name].half()), name
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_dtype_that_is_none(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(qwen), str(tmp_path / "export"), "--dtype", "int8"]) == 2
    assert capsys.readouterr().err == ("grpo-toolkit: dtype int8: not one of float64, float32, float16, bfloat16\n")
    assert not (tmp_path / "export").exists()


def test_what_the_asked_dtype_cannot_hold_is_refused(qwen: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    weights = load_file(qwen / WEIGHTS)
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model.norm.weight has values that are not finite in torch.float16"):
        export_model(base, tmp_path / "export", dtype="float16", verify=False)
