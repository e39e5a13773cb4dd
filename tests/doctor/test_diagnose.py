"""The doctor's findings on folders that real stacks wrote, exactly, and on published ones: none."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from transformers import AutoConfig

from grpo_toolkit import diagnose_checkpoint
from grpo_toolkit.doctor.diagnose import ALL_RULES
from grpo_toolkit.doctor.findings import Diagnosis, Severity
from tests.support.faulty import ROUTES, unpack
from tests.support.published import NAMES, build_published

if TYPE_CHECKING:
    from pathlib import Path

# What transformers 5 does to every folder that it saves from a published Qwen2.5-VL.
V5 = ["nested-text-config", "rope-parameters-alone", "extra-special-tokens-list", "preprocessor-config-missing"]
FINDINGS = {
    "vlm_r1_449": ["generation-cache-off", "config-cache-off-latent", "resume-starts-from-base"],
    "vlm_r1_451": ["generation-cache-off", "config-cache-off-latent", "resume-starts-from-base"],
    "visual_rft_449": [
        "setting-not-taken", "generation-cache-off", "config-cache-off-latent", "resume-starts-from-base",
    ],
    "easyr1_merger_451": [
        "tokenizer-missing", "processor-missing", "eos-differs", "generation-cache-off", "config-cache-off-latent",
        "generation-defaults-lost",
    ],
    "config_flag_455": ["nested-text-config", "config-cache-off-latent", "resume-starts-from-base"],
    "open_r1_457": ["nested-text-config", "tokenizer-missing", "processor-missing", "generation-cache-off"],
    "trl_grpo_457": ["nested-text-config", "wider-than-base", "resume-starts-from-base"],
    "trl_grpo_523": [*V5, "config-cache-off-latent", "wider-than-base", "resume-starts-from-base"],
    "trl_lora_523": ["extra-special-tokens-list", "adapter-on-vision"],
    "peft_prefixes_457": ["nested-text-config", "unmerged-lora", "mixed-dtypes"],
    "compiled_523": [*V5, "wrapped-names"],
    "fsdp_full_523": [*V5, "config-cache-off-latent", "head-doubled", "resume-starts-from-base"],
    "fsdp_sharded_523": ["fsdp-shards-only"],
    "zero3_523": [*V5, "unpublished-names", "config-cache-off-latent", "resume-starts-from-base"],
    "zero3_ungathered_523": [*V5, "zero-shards-only", "config-cache-off-latent"],
}  # fmt: skip
# Not judged without the base, or judged otherwise.
WITHOUT_BASE = {
    "easyr1_merger_451": {"eos-differs", "generation-defaults-lost"},
    "trl_grpo_457": {"wider-than-base"},
    "trl_grpo_523": {"wider-than-base"},
}
KINDS = {
    "trl_lora_523": "adapter",
    "fsdp_sharded_523": "sharded FSDP checkpoint",
    "zero3_ungathered_523": "DeepSpeed ZeRO checkpoint",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("base", tmp_path_factory.mktemp("bases") / "base")


def test_every_route_has_its_findings_written_down() -> None:
    assert sorted([*FINDINGS, "llava_523", "trl_llama_455"]) == ROUTES


@pytest.mark.parametrize("route", FINDINGS)
def test_findings_beside_the_base(route: str, base: Path, tmp_path: Path) -> None:
    diagnosis = diagnose_checkpoint(unpack(route, tmp_path / route), base=base)
    assert sorted(finding.code for finding in diagnosis.findings) == sorted(FINDINGS[route])
    assert diagnosis.kind == KINDS.get(route, "full model")
    assert diagnosis.base == base
    assert diagnosis.not_judged == ()
    ranks = [finding.severity.rank for finding in diagnosis.findings if finding.concerns(diagnosis.installed)]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("route", FINDINGS)
def test_findings_without_a_base(route: str, tmp_path: Path) -> None:
    diagnosis = diagnose_checkpoint(unpack(route, tmp_path / route))
    expected = set(FINDINGS[route]) - WITHOUT_BASE.get(route, set())
    if route == "trl_lora_523":
        expected |= {"adapter-base-elsewhere"}
    assert {finding.code for finding in diagnosis.findings} == expected
    assert "wider-than-base" in diagnosis.not_judged
    assert diagnosis.base is None


def test_a_text_model_of_an_older_trl(tmp_path: Path) -> None:
    [finding] = diagnose_checkpoint(unpack("trl_llama_455", tmp_path / "llama")).findings
    assert (finding.code, finding.file, finding.key) == ("config-cache-off-latent", "config.json", "use_cache")
    assert (finding.found, finding.severity, finding.repairable) == (False, Severity.WASTEFUL, True)


def test_a_llava_that_transformers_5_built(tmp_path: Path) -> None:
    findings = diagnose_checkpoint(unpack("llava_523", tmp_path / "llava")).findings
    assert [finding.code for finding in findings] == [
        "rope-parameters-alone",
        "tokenizers-backend",
        "extra-special-tokens-list",
        "preprocessor-config-missing",
        "unpublished-names",
    ]


def test_the_places_and_values_of_a_poisoned_folder(base: Path, tmp_path: Path) -> None:
    findings = diagnose_checkpoint(unpack("visual_rft_449", tmp_path / "x"), base=base).findings
    said = [(f.file, f.key, f.found, f.expected, f.repairable) for f in findings[:3]]
    assert said == [
        ("config.json", "use_cache", None, "a value of its type", True),
        ("config.json", "use_cache", None, "absent, as in the base", True),
        ("generation_config.json", "use_cache", None, "absent, as in the base", True),  # 5 takes its own default
    ]


def test_what_is_recognised(tmp_path: Path) -> None:
    assert diagnose_checkpoint(unpack("trl_lora_523", tmp_path / "lora")).facts == (
        "trainer checkpoint with optimizer", "by TRL", "written by transformers 5", "40 tensors, 0.01 MB, mostly F32",
    )  # fmt: skip
    assert diagnose_checkpoint(unpack("vlm_r1_449", tmp_path / "vlm")).facts == (
        "trainer checkpoint with optimizer", "qwen2_5_vl", "written by transformers 4.49.0",
        "56 tensors, 0.20 MB, mostly BF16",
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_published_folders_are_clean(name: str, tmp_path: Path) -> None:
    folder = build_published(name, tmp_path / name)
    assert diagnose_checkpoint(folder).findings == ()
    copy = build_published(name, tmp_path / "copy")
    assert diagnose_checkpoint(folder, base=copy).findings == ()


def test_the_named_base_is_used_if_it_is_here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    assert '"_name_or_path": "tiny/Qwen2.5-VL"' in (folder / "config.json").read_text()
    assert diagnose_checkpoint(folder).base is None
    repository = tmp_path / "hub" / "models--tiny--Qwen2.5-VL"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc123").symlink_to(base)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert diagnose_checkpoint(folder).base == repository / "snapshots" / "abc123"


@pytest.mark.parametrize("where", ["hf", "default", "actor/huggingface"])
def test_readers_of_a_folder_above_the_model_fail(where: str, base: Path, tmp_path: Path) -> None:
    inner = shutil.copytree(base, tmp_path / "named" / where)
    found = diagnose_checkpoint(tmp_path / "named")
    assert isinstance(found, Diagnosis)
    assert (found.path, [finding.code for finding in found.findings]) == (inner, ["model-below"])
    with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
        AutoConfig.from_pretrained(tmp_path / "named")
    assert diagnose_checkpoint(inner).is_clean


def test_the_checkpoints_of_a_run_are_where_they_belong(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run/checkpoint-7")
    assert diagnose_checkpoint(tmp_path / "run").is_clean


def test_rules_are_named_evenly_and_say_everything() -> None:
    for rule in ALL_RULES:
        assert rule.code == rule.check.__name__.replace("_", "-")
        assert rule.evidence.startswith("https://")
        assert len(rule.effect) > 30, rule.code
    assert len({rule.title for rule in ALL_RULES}) == len(ALL_RULES) >= 50
