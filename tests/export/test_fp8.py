"""FP8: which layers, the very bytes of llmcompressor, what a reader makes of the folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis
from grpo_toolkit.doctor.readers import installed_reader
from grpo_toolkit.doctor.repair import repair_checkpoint
from grpo_toolkit.errors import InputError, UnsupportedError, VerificationError
from grpo_toolkit.export.fp8.layers import find_layers
from grpo_toolkit.export.fp8.quantise import plan_fp8, quantization_config, write_fp8
from grpo_toolkit.model.load import load_model
from tests.support.models import BUILDERS, MERGE_BUILDERS, build_qwen2_5_vl

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (the extra fp8)")
pytestmark = pytest.mark.stack

PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
VISION_NAMES = ["re:visual.*", "re:model.visual.*"]  # in llmcompressor's own example for Qwen2.5-VL


def quantised(source: Path, target: Path, *, max_shard_size: int | None = None, ignore: Any = None) -> Path:
    """A model folder in FP8, without the rest of an export."""
    base = open_base(open_checkpoint(source))
    layers = find_layers(base)
    target.mkdir()
    write_fp8(plan_fp8(base, layers, max_shard_size=max_shard_size), target)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(layers.ignore if ignore is None else ignore)
    (target / "config.json").write_text(json.dumps(config))
    return target


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (value.dtype, tuple(value.shape), value.view(torch.uint8).numpy().tobytes())
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_linear_layers_of_the_text_model_become_fp8_and_nothing_else(family: str, tmp_path: Path) -> None:
    source = BUILDERS[family](tmp_path / "source")
    before, after = weights_of(source), weights_of(quantised(source, tmp_path / "fp8"))
    fp8 = {name for name, value in after.items() if value.dtype == torch.float8_e4m3fn}
    assert {name.rpartition("layers.")[2].partition(".")[2].removesuffix(".weight") for name in fp8} == PROJECTIONS
    assert len(fp8) == 14
    assert not any(part in name for name in fp8 for part in ("visual", "vision", "projector", "lm_head", "embed"))
    assert after.keys() - before.keys() == {f"{name}_scale" for name in fp8}
    assert {name: value for name, value in raw(after).items() if name in before.keys() - fp8} == {
        name: value for name, value in raw(before).items() if name not in fp8
    }
    for name in fp8:  # three bits of mantissa: half a step is a sixteenth of a value
        restored = after[name].float() * after[f"{name}_scale"].float()
        step = before[name].abs() / 16 + 2e-3 * after[f"{name}_scale"].float()
        assert bool(((restored - before[name].float()).abs() <= 1.15 * step).all()), name


@pytest.mark.parametrize("way", ["oneshot", "model_free_ptq"])
def test_every_byte_is_llmcompressors(base: Path, tmp_path: Path, way: str) -> None:
    pytest.importorskip("llmcompressor", reason="needs llmcompressor beside us")
    script = {
        "oneshot": "from transformers import AutoModelForImageTextToText as Auto\n"
        "from llmcompressor import oneshot\n"
        "from llmcompressor.modifiers.quantization import QuantizationModifier\n"
        "model = Auto.from_pretrained(source, dtype='auto')\n"
        "oneshot(model=model, recipe=QuantizationModifier(targets='Linear', scheme='FP8_DYNAMIC', ignore=ignore))\n"
        "model.save_pretrained(target)\n",
        "model_free_ptq": "from llmcompressor import model_free_ptq\n"
        "model_free_ptq(source, target, scheme='FP8_DYNAMIC', ignore=[*ignore, 're:.*embed_tokens$'])\n",
    }[way]
    ignore = ["lm_head", *VISION_NAMES]
    code = f"source, target, ignore = {str(base)!r}, {str(tmp_path / 'theirs')!r}, {ignore!r}\n{script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert raw(weights_of(quantised(base, tmp_path / "ours"))) == raw(weights_of(tmp_path / "theirs"))
    ours, theirs = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("ours", "theirs")
    )
    for config in (ours, theirs):
        config.pop("ignore")
        config.pop("version")
        config.pop("sparsity_config", None)
        [group] = config.pop("config_groups").values()
        config["group"] = {key: value for key, value in group.items() if key != "weights"}
        # Whom they let observe a weight while they calibrate.
        config["weights"] = {key: value for key, value in group["weights"].items() if key != "observer"}
    assert ours == theirs


def test_transformers_holds_fp8_until_the_first_forward_and_rounds_activations_after_it(
    base: Path, tmp_path: Path
) -> None:
    """Its documentation says so of 5.24, and it is the same in 4.57: on a CPU no product is of FP8."""
    model, _, report = load_model(quantised(base, tmp_path / "fp8"))
    assert report.is_clean
    layer = model.get_decoder().layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.float8_e4m3fn
    tower = {p.dtype for name, p in model.named_parameters() if "visual" in name}
    assert tower == {torch.bfloat16}
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
        assert layer.weight.dtype == torch.bfloat16
        stored = weights_of(tmp_path / "fp8")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(layer.weight, stored[name].bfloat16() * stored[f"{name}_scale"])
        given = torch.randn(3, layer.in_features, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
        plain = torch.nn.functional.linear(given, layer.weight, layer.bias)
        assert not torch.equal(layer(given), plain)
        assert torch.allclose(layer(given), plain, atol=0.1 * float(plain.abs().max()))


def load_report(folder: Path) -> set[str]:
    """The names of scales that transformers misses in a folder, or finds and has no use for."""
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    return {key for kind in ("missing_keys", "unexpected_keys") for key in info[kind] if key.endswith("weight_scale")}


def codes(folder: Path) -> set[str]:
    found = diagnose_checkpoint(folder)
    assert isinstance(found, Diagnosis)
    return {finding.code for finding in found.findings if finding.concerns(installed_reader())}


def test_names_of_one_release_leave_the_tower_with_scales_that_no_file_holds(base: Path, tmp_path: Path) -> None:
    """llmcompressor writes `visual.blocks.0...`, and transformers since 4.52 looks for `model.visual.blocks.0...`."""
    tensors = weights_of(base)
    names = [n.removesuffix(".weight") for n in tensors if n.startswith("visual.") and n.endswith(".weight")]
    folder = quantised(base, tmp_path / "fp8", ignore=["lm_head", *names])
    missing = load_report(folder)
    assert len(missing) == 12
    assert all("visual" in key for key in missing)
    assert codes(folder) == {"ignore-misses"}
    repair_checkpoint(folder)
    assert codes(folder) == set()
    assert load_report(folder) == set()


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fault", "code", "seen"),
    [
        ("scale missing", "fp8-scale-missing", "0.self_attn.q_proj.weight_scale"),
        ("scale flat", "fp8-scale-shape", RuntimeError),
        ("unsaid", "fp8-unsaid", "weight_scale"),
        ("ignored", "quantization-disagrees", "0.self_attn.q_proj.weight_scale"),
        ("head", "ignore-misses", "lm_head.weight_scale"),
        ("unquantised", "ignore-misses", "0.self_attn.q_proj.weight_scale"),
        ("", "", ""),
    ],
)
def test_the_doctor_and_transformers_are_of_one_mind(
    base: Path, tmp_path: Path, fault: str, code: str, seen: Any
) -> None:
    patterns = find_layers(open_base(open_checkpoint(base))).ignore
    ignore = {"head": [one for one in patterns if "visual" in one], "ignored": [*patterns, rf"re:.*{LAYER[12:]}$"]}
    folder = quantised(base, tmp_path / "fp8", ignore=ignore.get(fault))
    tensors, name = weights_of(folder), f"{LAYER}.weight"
    if fault in ("scale missing", "unquantised"):
        del tensors[f"{name}_scale"]
    if fault == "unquantised":
        tensors[name] = weights_of(base)[name]
    if fault == "scale flat":
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if fault == "unsaid":
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    assert codes(folder) == ({code} if code else set())
    if seen is RuntimeError:
        with pytest.raises(RuntimeError):
            load_report(folder)
    else:
        assert [key for key in load_report(folder) if key.endswith(seen)] or not seen


def test_shards_are_as_large_as_asked(base: Path, tmp_path: Path) -> None:
    whole, split = quantised(base, tmp_path / "whole"), quantised(base, tmp_path / "split", max_shard_size=100_000)
    assert len(list(split.glob("*.safetensors"))) > 2
    assert raw(weights_of(split)) == raw(weights_of(whole))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights_of(whole).keys()
    assert load_model(split)[2].is_clean


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "mixtral"])
def test_layers_that_fp8_cannot_hold_are_refused_by_name(family: str, tmp_path: Path) -> None:
    source = open_base(open_checkpoint(MERGE_BUILDERS[family](tmp_path / "source")))
    with pytest.raises(UnsupportedError, match=r"are of layers that this FP8 cannot hold") as found:
        find_layers(source)
    assert "\n" not in str(found.value)
    assert ("experts" in str(found.value)) or family == "gpt2"


def test_a_quantised_folder_is_refused(base: Path, tmp_path: Path) -> None:
    folder = quantised(base, tmp_path / "fp8")
    with pytest.raises(InputError, match=r"quantization_config is set \(compressed-tensors\), so this is quantised"):
        find_layers(open_base(open_checkpoint(folder)))


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", dtype="bfloat16")
    tensors = weights_of(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity"):
        quantised(source, tmp_path / "fp8")
