"""Reports of 2025 and 2026, built anew: what the doctor says of each, and what its reader really does with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit import diagnose_checkpoint, repair_checkpoint, verify_export
from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import DIALECT_CODES
from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.findings_check import serious_findings
from grpo_toolkit.export.verify import plain_request
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.drawn_pictures import picture_requests, sight_of
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.load import load_model
from scripts.models.base_variants import change_json
from tests.support.models import build_llama, build_qwen2_5_vl, build_qwen3_moe
from tests.support.wild import REPORTS, build_report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack
VERSION = Version(transformers.__version__)
IS_OLDEST = Version("4.51") > VERSION
FORMS = DIALECT_CODES - {"theta-in-rope-scaling"}  # of the release that wrote the base
# What is found without the base, and with it where that is more or other.
FOUND: dict[str, tuple[set[str], set[str]]] = {
    "tokenizer that cuts": ({"tokenizer-cuts"}, {"tokenizer-cuts"}),
    "adapter without task and scale": ({"adapter-alpha-zero"}, {"adapter-alpha-zero"}),
    "value head": ({"value-head-stored"}, {"value-head-stored"}),
    "limit of the rollouts": (set(), {"answers-capped"}),
    "text-only processor": ({"processor-missing"}, {"processor-missing"}),
    "text-only template": ({"template-without-pictures"}, {"template-without-pictures"}),
    "template in the tokenizer": ({"template-in-tokenizer-alone"}, {"template-in-tokenizer-alone"}),
    "tower dropped by the merge": ({"vision-tower-missing"}, {"tensors-missing"}),
    "stacked experts": ({"experts-stacked"}, {"experts-stacked"}),
    "part alone": ({"vision-tower-missing"}, {"tensors-missing", "unpublished-names"}),
    "compiled adapter": ({"adapter-names-wrapped"}, {"adapter-names-wrapped"}),
    "wide adapter": ({"adapter-rank-high"}, {"adapter-rank-high"}),
    "padded rows": ({"vocabulary-mismatch"}, {"vocabulary-mismatch", "shapes-differ"}),
    "theta in rope_scaling": ({"theta-in-rope-scaling"}, {"theta-in-rope-scaling"}),
    "headless class": (set(), {"tensors-missing"}),  # alone it may be a model of embeddings
    "no architectures": ({"architectures-missing"}, {"architectures-missing"}),
    "adapter on an unembedding": ({"adapter-reaches-nothing"}, {"adapter-reaches-nothing"}),
    "MLX adapter": ({"adapter-of-mlx"}, {"adapter-of-mlx"}),
    "ungathered adapter": ({"empty-tensors"}, {"empty-tensors"}),
    "replaced end": ({"eos-token-lost"}, {"eos-token-lost"}),
    "text adapter": ({"adapter-named-for-older"}, {"adapter-named-for-older"}),
}
NOTED = {"adapter-rank-high"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    llama = build_llama(folder / "llama")
    # A frequency that is not the default, so that a reader who misses it answers otherwise.
    change_json(llama, "config.json", lambda content: content.get("rope_parameters", content).update(rope_theta=5e5))
    built = {"qwen": build_qwen2_5_vl(folder / "qwen", dtype="bfloat16"), "llama": llama}
    return built if IS_OLDEST else {**built, "moe": build_qwen3_moe(folder / "moe")}


def base_of(name: str, bases: dict[str, Path]) -> Path:
    if REPORTS[name].base not in bases:
        pytest.skip("4.49 has no Qwen3-MoE")
    return bases[REPORTS[name].base]


def codes(folder: Path, base: Path | None = None) -> set[str]:
    """Return what is found but for notes, the forms of a release, and the tokenizer that the mixture has none of."""
    findings = diagnose_checkpoint(folder, base=base).findings
    serious = {found.code for found in findings if found.severity.value != "note" or found.code in NOTED}
    return serious - FORMS - {"tokenizer-missing"}


def what_the_reader_does(folder: Path, base: Path, *, is_adapter: bool) -> str:
    """Return what the installed reader does: refuses, starts at random, stumbles at a picture, or answers."""
    try:
        model, processor, report = load_model(folder, base=base if is_adapter else None)
    except (OSError, RuntimeError, KeyError, ValueError):
        return "refuses"
    if report.missing:
        return "starts at random"
    if (folder / "chat_template.json").exists() or (folder / "tokenizer_config.json").exists():
        sight = sight_of(processor, model)
        if sight.takes_pictures and sight.why_not:
            return "has no template"
        try:
            for request in picture_requests(sight)[:2]:
                generate(model, processor, request)
        except (ValueError, RuntimeError, IndexError):
            return "stumbles"
    own, theirs = (tokens(one) for one in (model, load_model(base)[0]))
    return "answers as the base" if own == theirs else "answers otherwise"


def tokens(model: torch.nn.Module) -> list[int]:
    torch.manual_seed(0)
    given = torch.arange(1, 20)[None]
    return list(model.generate(given, max_new_tokens=6, do_sample=False)[0, 19:].tolist())  # type: ignore[operator]


def test_every_report_is_judged() -> None:
    assert set(FOUND) == set(REPORTS)
    assert len({report.thread for report in REPORTS.values()}) >= 20


@pytest.mark.parametrize("name", REPORTS)
def test_what_the_doctor_says(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = base_of(name, bases)
    folder = build_report(name, base, tmp_path / "folder")
    alone, beside = FOUND[name]
    # The adapters are this release's own; 5 does not know how 4.49 names them.
    also = {"adapter-named-for-older"} if IS_OLDEST and name == "adapter on an unembedding" else set()
    assert codes(base) == set()
    assert codes(folder) - also == alone
    assert codes(folder, base) == beside | also


DOES = {
    "tokenizer that cuts": "stumbles",
    "text-only template": "stumbles",
    "template in the tokenizer": "has no template",
    "tower dropped by the merge": "starts at random",
    "part alone": "starts at random",
    "compiled adapter": "starts at random",
    "headless class": "starts at random",
    "MLX adapter": "refuses",
    "ungathered adapter": "refuses",
    "padded rows": "refuses",
    "adapter without task and scale": "answers as the base",
    "value head": "answers as the base",  # vLLM alone refuses
    "no architectures": "answers as the base",  # servers alone refuse
    "wide adapter": "answers otherwise",  # as it should: the adapter's own words
}
IN_49_TOO = "text-only processor"
IF_NEW = {
    "text-only processor": ("refuses", Version("5")),
    "text adapter": ("starts at random", Version("5")),
    "theta in rope_scaling": ("answers as the base", Version("5")),
}


@pytest.mark.parametrize("name", [*DOES, *IF_NEW])
def test_what_the_reader_does(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, is_adapter = base_of(name, bases), REPORTS[name].is_adapter
    folder = build_report(name, base, tmp_path / "folder")
    found = what_the_reader_does(folder, base, is_adapter=is_adapter)
    # The doctor, and `verify` with it, says of the installed reader what that reader does.
    serious = serious_findings(folder, base=base)
    assert (serious != []) is (found in ILL or name in SILENT), [finding.code for finding in serious]
    if name in DOES:
        assert found == DOES[name]
    else:
        assert (found == IF_NEW[name][0]) is (IF_NEW[name][1] <= VERSION or (IS_OLDEST and name == IN_49_TOO))


ILL = ("refuses", "starts at random", "stumbles", "has no template")
# What no exception and no warning shows: the base's words where the adapter's or the folder's own were meant.
SILENT = {"adapter without task and scale"} | ({"theta in rope_scaling"} if Version("5") > VERSION else set())

OF_READERS = {
    "value head": {"vllm": False, "sglang": True, "transformers==5.24": True, "transformers==4.49": True},
    "no architectures": {"vllm": False, "sglang": False, "transformers==5.24": True, "transformers==4.49": True},
    "limit of the rollouts": {"vllm": False, "sglang": True, "transformers==5.24": True},
    "text adapter": {
        "transformers==4.49": True,
        "transformers==4.57": True,
        "transformers==5.24": False,
        "vllm": True,
    },
    "theta in rope_scaling": {"transformers==4.49": False, "transformers==4.57": False, "transformers==5.24": True},
    "text-only processor": {"transformers==4.49": False, "transformers==4.57": True, "transformers==5.24": False},
    "template in the tokenizer": {"transformers==4.57": False, "vllm": True, "sglang": True},
    "tokenizer that cuts": {"transformers==4.57": False, "transformers==5.24": False, "vllm": False, "sglang": False},
}


@pytest.mark.parametrize("name", OF_READERS)
def test_whom_it_concerns(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = base_of(name, bases)
    folder = build_report(name, base, tmp_path / "folder")
    _, beside = FOUND[name]
    for reader, is_fine in OF_READERS[name].items():
        judged = diagnose_checkpoint(folder, base=base, reader=reader).judged
        assert ({finding.code for finding in judged} & beside == set()) is is_fine, reader


MENDED = [
    "tokenizer that cuts", "text-only processor", "text-only template", "template in the tokenizer", "value head",
    "limit of the rollouts", "theta in rope_scaling", "no architectures", "replaced end",
]  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_answers(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = base_of(name, bases)
    folder = build_report(name, base, tmp_path / "folder")
    repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert codes(folder, base) == set()
    does = what_the_reader_does(folder, base, is_adapter=False)
    assert does == "answers as the base"


@pytest.mark.parametrize("name", ["tokenizer that cuts", "text-only template"])
def test_what_fails_at_a_picture_is_not_verified_and_not_published(
    name: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_report(name, bases["qwen"], tmp_path / "folder")
    failures = {check.name: check.detail for check in verify_export(folder, base=bases["qwen"]).failures}
    assert failures.keys() == {"nothing found by the doctor", "pictures answered"}
    assert "a picture of 112 x 84" in failures["pictures answered"]
    assert main(["export", str(folder), str(tmp_path / "out"), "--base", str(bases["qwen"])]) == 1
    assert "pictures answered" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_processor_without_eyes_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = build_report("text-only processor", bases["qwen"], tmp_path / "folder")
    try:
        said = "; ".join(check.detail for check in verify_export(folder).failures)
    except WorkerError as error:
        said = str(error)
    assert Version("5") > VERSION or "processor" in said
    assert prepare_inputs(load_model(bases["qwen"])[1], [plain_request()])["input_ids"].shape[1] > 1
