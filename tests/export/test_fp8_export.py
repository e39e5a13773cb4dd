"""An export in FP8 from end to end: what is compared, what is published, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.manifest import compare_manifest, manifest_of
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, UnsupportedError, VerificationError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.fp8.compare import compare_answers
from grpo_toolkit.export.fp8.fidelity import check_agreement, check_divergence, check_reward
from grpo_toolkit.export.fp8.publish import is_verified_export
from grpo_toolkit.export.push_to_hub import _is_published_as_verified
from grpo_toolkit.merge.merge import merge_adapter
from grpo_toolkit.model.generation.evidence import Evidence
from grpo_toolkit.model.load import load_model
from tests.support.model_servers import build_adapter
from tests.support.models import build_qwen2_5_vl
from tests.support.training import LANGUAGE_Q

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (the extra fp8)")

COMPARED = ["distributions near the export's", "greedy tokens of the export"]


def steady(folder: Path) -> Path:
    """A base whose layers say so little that FP8 changes nothing: of random weights it changes almost every answer."""
    tensors = load_file(build_qwen2_5_vl(folder, dtype="bfloat16") / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(("o_proj.weight", "mlp.down_proj.weight")) and "visual" not in name:
            value *= 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def steady_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return steady(tmp_path_factory.mktemp("steady") / "base")


@pytest.fixture(scope="module")
def export(steady_base: Path) -> Path:
    """A verified export."""
    folder = steady_base.with_name("export")
    export_model(steady_base, folder)
    return folder


@pytest.fixture(scope="module")
def fp8(export: Path) -> Path:
    folder = export.with_name("fp8")
    export_model(export, folder, format="fp8")
    return folder


@pytest.fixture(scope="module")
def rejected(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A base of random weights, and how its FP8 was refused."""
    target = tmp_path_factory.mktemp("rejected") / "fp8"
    with pytest.raises(VerificationError) as found:
        export_model(base, target, format="fp8")
    return target, str(found.value)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_is_quantised_as_it_is_and_checked_as_every_export(export: Path, fp8: Path) -> None:
    manifest = manifest_of(fp8)
    names = [check["name"] for check in manifest["verification"]["checks"]]
    assert names[-2:] == COMPARED
    assert {"tensors as in the base", "nothing found by the doctor", "loads whole", "pictures answered"} < set(names)
    assert manifest["verification"]["passed"] is True
    assert manifest["verification_of_the_export"] == manifest_of(export)["verification"]
    assert compare_manifest(fp8)[1] == {}
    figures = manifest["fp8"]["figures"]
    assert 0 <= figures["divergence"]["low"] <= figures["divergence"]["value"] <= figures["divergence"]["high"] < 1e-3
    assert figures["agreement"]["value"] == 1.0
    assert set(manifest["fp8"]["readers"]) == {"vllm", "sglang", "transformers"}
    for path in export.iterdir():
        if path.name not in ("config.json", "model.safetensors", "grpo_toolkit.json"):
            assert (fp8 / path.name).read_bytes() == path.read_bytes()
    config = json.loads((fp8 / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((export / "config.json").read_text())


def test_what_is_too_far_from_its_export_is_kept_under_another_name(rejected: tuple[Path, str]) -> None:
    target, message = rejected
    assert message.startswith("not published, because the export failed verification: distributions near the export's")
    assert "allowed up to 0.05; " in message
    assert "accept_loss=True (--accept-loss)" in message
    assert left_in(target.parent) == ["fp8.rejected"]
    report = manifest_of(target.with_name("fp8.rejected"))
    assert [check["name"] for check in report["verification"]["checks"] if not check["passed"]] == COMPARED
    assert not _is_published_as_verified(report)


def test_a_loss_that_is_accepted_is_published_with_its_figure(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "fp8"
    assert main(["export", str(base), str(target), "--format", "fp8", "--accept-loss", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert left_in(tmp_path) == ["fp8"]  # the export that was made for it is gone
    manifest = manifest_of(target)
    assert manifest["fp8"]["loss_accepted"] == COMPARED
    assert manifest["fp8"]["figures"]["divergence"]["high"] > 0.05
    assert manifest["verification"]["passed"] is False
    assert _is_published_as_verified(manifest)
    page = (target / "README.md").read_text()
    assert "further from the unquantised export than the tolerance" in page
    assert f"| KL divergence, nats per token | {manifest['fp8']['figures']['divergence']['value']:.3g} |" in page


def test_an_adapter_is_merged_before_it_is_quantised(steady_base: Path, tmp_path: Path) -> None:
    shutil.copytree(steady_base, tmp_path / "base")
    adapter = build_adapter(tmp_path / "base", LANGUAGE_Q)
    export_model(adapter, tmp_path / "plain")
    export_model(adapter, tmp_path / "fp8", format="fp8", accept_loss=True, max_shard_size="200KB")
    merged, quantised = load_file(tmp_path / "plain" / "model.safetensors"), {}
    for path in (tmp_path / "fp8").glob("*.safetensors"):
        quantised |= load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    restored = quantised[name].float() * quantised[f"{name}_scale"].float()
    assert torch.allclose(restored, merged[name].float(), atol=0.04 * float(merged[name].abs().max()))
    assert not torch.allclose(merged[name], load_file(steady_base / "model.safetensors")[name], atol=0.05)
    assert left_in(tmp_path) == ["adapter", "base", "fp8", "plain"]


def test_a_live_model_is_exported_before_it_is_quantised(steady_base: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(steady_base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.25)
    target = tmp_path / "fp8"
    result = export_model(model, target, base=steady_base, processing_class=processor, format="fp8")
    assert result is not None
    assert result.sources["source"].startswith("live model (Qwen2_5_VLForConditionalGeneration")
    assert left_in(tmp_path) == ["fp8"]
    stored = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, model.get_input_embeddings().weight)


def test_only_an_export_that_was_verified_and_not_changed_is_taken_as_it_is(export: Path, tmp_path: Path) -> None:
    assert is_verified_export(export)
    changed = shutil.copytree(export, tmp_path / "changed")
    (changed / "generation_config.json").write_text("{}")
    assert not is_verified_export(changed)
    assert not is_verified_export(tmp_path)


def test_a_reward_is_held_against_the_exports(export: Path, fp8: Path, image_request: Any) -> None:
    prompts = [
        {"prompt": [{"role": "user", "content": "What is this?"}], "image": image_request.images[0], "wanted": number}
        for number in range(4)
    ]
    seen = []

    def reward(completions: list[Any], wanted: list[int], **kwargs: Any) -> list[float]:
        seen.append((len(completions), wanted, sorted(kwargs)))
        return [float(len(completion[0]["content"])) for completion in completions]

    found = compare_answers(export, fp8, prompts=prompts, reward_funcs=[reward])
    assert [check.name for check in found.checks] == [*COMPARED, "reward kept: reward"]
    assert all(check.passed for check in found.checks)
    assert found.figures["reward"].value == 0.0
    assert seen == [(4, [0, 1, 2, 3], ["completion_ids", "prompts"])] * 2


def evidence(rows: list[list[float]]) -> Evidence:
    return Evidence(inputs={}, logits=torch.tensor(rows))


def test_the_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (Evidence(inputs={}, logits=one), Evidence(inputs={}, logits=one + torch.randn(5, 7, generator=generator)))
        for one in torch.randn(6, 5, 7, generator=generator)
    ]
    check, figure = check_divergence(pairs)
    wanted = torch.cat([torch.log_softmax(want.logits.double(), 1) for want, _ in pairs])
    found = torch.cat([torch.log_softmax(got.logits.double(), 1) for _, got in pairs])
    expected = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
    assert figure.value == pytest.approx(float(expected))
    assert figure.low < figure.value < figure.high
    assert not check.passed


def test_what_is_not_finite_is_not_near() -> None:
    pair = (evidence([[1.0, 2.0]]), evidence([[float("nan"), 2.0]]))
    assert not check_divergence([pair, pair])[0].passed


def test_the_interval_is_judged_and_not_the_figure() -> None:
    same = [(evidence([[1.0, 2.0]] * 16), evidence([[1.0, 2.0]] * 16))]
    assert check_agreement(same * 4)[0].passed
    check, figure = check_agreement(same)  # as many as sixteen equal tokens may be chance
    assert (figure.value, check.passed) == (1.0, False)
    assert check_reward("reward", [1.0] * 50, [1.0] * 50)[0].passed
    check, figure = check_reward("reward", [1.0] * 20, [*[1.0] * 19, 0.0])
    assert (figure.value, check.passed) == (pytest.approx(-0.05), False)


def test_a_quantised_source_is_one_line(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(fp8), str(tmp_path / "again"), "--format", "fp8"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "quantization_config is set (compressed-tensors), so this is quantised already; name the folder" in line
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accept-loss"], "--prompts and --accept-loss are about FP8: add --format fp8"),
        (["--format", "fp8", "--link"], "to which --link can make no link"),
        (["--format", "fp8", "--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    export: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(export), str(tmp_path / "out"), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert left_in(tmp_path) == []


def test_without_the_library_a_line_says_what_to_install(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(InputError, match=r"not installed here: pip install grpo-toolkit\[fp8\]"):
        export_model(export, tmp_path / "fp8", format="fp8")
    assert left_in(tmp_path) == []


def test_too_little_disk_is_told_before_anything_is_written(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 1000))
    with pytest.raises(InputError, match=r"GB are needed and 0\.0 GB are free; make room"):
        export_model(export, tmp_path / "fp8", format="fp8")
    assert left_in(tmp_path) == []


def test_another_format_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format 'int4': not one of fp8"):
        export_model(export, tmp_path / "out", format="int4")


def test_an_adapter_is_not_merged_into_fp8(fp8: Path, steady_base: Path, tmp_path: Path) -> None:
    shutil.copytree(steady_base, tmp_path / "base")
    adapter = build_adapter(tmp_path / "base", LANGUAGE_Q)
    way_out = r"quantization_config is set; name the unquantised base \(--base\)"
    with pytest.raises(UnsupportedError, match=way_out):
        merge_adapter(adapter, tmp_path / "merged", base=fp8)
    with pytest.raises(UnsupportedError, match=way_out):
        export_model(adapter, tmp_path / "exported", base=fp8)
    assert left_in(tmp_path) == ["adapter", "base"]


@pytest.mark.slow
def test_a_trained_model_earns_in_fp8_what_it_earned(tmp_path: Path) -> None:
    """The tiny base of the recipe, its held-out digits, its own reward."""
    from grpo_vlm.data.digits import load_digits_split
    from grpo_vlm.rewards.rewards import accuracy_reward
    from scripts.models.tiny_vlm import ensure_tiny_vlm

    prompts = [dict(row) for row in load_digits_split("held_out", size=48)]
    folder = ensure_tiny_vlm(tmp_path / "cache")
    export_model(folder, tmp_path / "fp8", format="fp8", prompts=prompts, reward_funcs=[accuracy_reward])
    figures = manifest_of(tmp_path / "fp8")["fp8"]["figures"]
    assert figures["divergence"]["high"] < 0.01
    assert figures["agreement"]["low"] > 0.97
    assert figures["accuracy_reward"]["low"] >= -0.05
    assert open_checkpoint(tmp_path / "fp8").tensors()["model.layers.0.mlp.up_proj.weight"].dtype == "F8_E4M3"
