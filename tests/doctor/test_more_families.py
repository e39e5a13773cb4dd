"""Families that no rule was written beside: what their readers mind is found, and what they do not ask for is not."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis
from grpo_toolkit.doctor.repair import repair_checkpoint
from scripts.models.base_variants import change_json, change_weights
from scripts.models.families import VISION, build_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the families are built as transformers 5 knows them"
)
CONFIG = "config.json"


def _set(file: str, *path: str, value: Any) -> Callable[[Path], object]:
    """Return a change that sets a key of a JSON file, or with None deletes it."""

    def edit(node: dict[str, Any]) -> None:
        for key in path[:-1]:
            node = node[key]
        if value is None:
            del node[path[-1]]
        else:
            node[path[-1]] = value

    return lambda folder: change_json(folder, file, edit)


def _rename_bias(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("1.mlp.experts.down_proj_bias", "1.mlp.experts.old_bias"): held[name] for name in held}

    change_weights(folder, change)


def _break_last_layer(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = ("vision_tower.encoder.layers.1.", "vision_tower.vision_model.encoder.layers.1.")
        return {
            name: values.fill_(float("inf")) if any(part in name for part in last) else values
            for name, values in held.items()
        }

    change_weights(folder, change)


MINDED = [
    ("gemma3_text", _set(CONFIG, "head_dim", value=None), "settings-lost"),
    ("falcon", _set(CONFIG, "vocab_size", value=-7), "vocabulary-mismatch"),
    ("gpt_neox", _set(CONFIG, "hidden_dropout", value=-1.0), "dropout-no-share"),
    ("gpt_oss", _rename_bias, "tensors-missing"),
    ("gpt_oss", _set(CONFIG, "rope_parameters", "truncate", value=True), "rope-scaling-differs"),
    (
        "internvl",
        _set("processor_config.json", "video_processor", "size", value={"width": 384}),
        "video-size-unusable",
    ),
]
UNMINDED = [
    ("gpt_neox", _set(CONFIG, "classifier_dropout", value=-1.0)),  # of a class of its own
    ("deepseek_v3", _set(CONFIG, "qk_head_dim", value=-9)),  # worked out of two others
    ("llava_next", _break_last_layer),  # behind the layer whose features are taken
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = build_family(family, tmp_path_factory.mktemp("bases") / family)
        return made[family]

    return build


def _answers(folder: Path, family: str) -> tuple[set[str], torch.Tensor] | None:
    """Return the tensors that the installed reader misses and its logits for a prompt, or None where it fails."""
    sees = family in VISION
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        if sees:
            AutoProcessor.from_pretrained(folder)
        torch.manual_seed(0)
        model, report = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
        with torch.no_grad():
            return set(report["missing_keys"]), model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    except Exception:
        return None


def _is_same(one: tuple[set[str], torch.Tensor] | None, other: tuple[set[str], torch.Tensor] | None) -> bool:
    assert one is not None
    return other is not None and one[0] == other[0] and torch.allclose(one[1], other[1], atol=1e-4)


def _serious(folder: Path, base: Path) -> set[str]:
    found = diagnose_checkpoint(folder, base=base, deep=True)
    assert isinstance(found, Diagnosis)
    return {one.code for one in found.findings if one.severity.value in ("unloadable", "wrong", "slow")}


@pytest.mark.parametrize(("family", "change", "code"), MINDED)
def test_what_a_reader_minds_is_found(
    family: str, change: Callable[[Path], object], code: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(family)
    folder = shutil.copytree(base, tmp_path / "checkpoint")
    before = _answers(folder, family)
    change(folder)
    assert not _is_same(before, _answers(folder, family))
    found = diagnose_checkpoint(folder, base=base)
    assert isinstance(found, Diagnosis)
    [finding] = [one for one in found.judged if one.code == code]
    if finding.repairable:
        repair_checkpoint(folder, base=base)
        assert _is_same(before, _answers(folder, family))


@pytest.mark.parametrize(("family", "change"), UNMINDED)
def test_what_no_reader_asks_for_is_no_fault(
    family: str, change: Callable[[Path], object], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(family)
    folder = shutil.copytree(base, tmp_path / "checkpoint")
    before, said = _answers(folder, family), _serious(folder, base)
    change(folder)
    assert _is_same(before, _answers(folder, family))
    assert _serious(folder, base) <= said
