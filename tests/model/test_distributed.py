"""Two processes: every kind of training that people launch ends in the same export, and in saves that are as good."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.folders.trainer_checkpoints import why_not_whole
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.load import load_model
from tests.support.launch import ALONE, KINDS, launch, stored_weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from grpo_toolkit.model.generation.request import Request

Report = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training on two processes with every callback: where it is, and what each rank reported."""

    folder: Path
    reports: list[Report]


@pytest.fixture(scope="module")
def runs(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each kind of training, run when it is first asked for."""
    done: dict[str, Run] = {}

    def run(kind: str) -> Run:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            done[kind] = Run(folder, launch(kind, "all_callbacks", folder, model=str(qwen)))
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_ends_in_the_same_export(
    kind: str, runs: Any, qwen: Path, image_request: Request
) -> None:
    run = runs(kind)
    main, other = run.reports
    assert (main["step"], main["exported"], main["failures"]) == (2, True, [])
    assert "same greedy tokens as the trained policy" in main["checks"]
    assert (other["step"], other["exported"], other["failures"]) == (2, False, [])
    assert main["arms"] == {"checkpoint": True, "export": True}
    assert other["arms"] == {}

    base, reference, found = (
        stored_weights(folder) for folder in (qwen, runs(ALONE).folder / "export", run.folder / "export")
    )
    assert max(distance(base, reference)) > 1e-4  # it was trained
    assert found.keys() == reference.keys() == base.keys()  # tied: no lm_head
    assert {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in base.values()}
    assert max(distance(found, reference)) <= 1e-6
    model, processor, report = load_model(run.folder / "export")
    assert report.is_clean
    assert generate(model, processor, image_request).is_cached


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[float]:
    return [float((tensor - other[name]).abs().max()) for name, tensor in one.items()]


# What a plain trainer leaves in its saves, by kind: names of tensors that the base does not have, or no weights.
FAULTS = {
    "fsdp2_full": {"lm_head.weight"},  # the tied head a second time
    "zero2": {"lm_head.weight"},
    "zero3": {"model.model.norm.weight"},  # renamings of loading undone that never applied
}


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_saves_have_the_bases_tensors_where_a_plain_trainers_do_not(
    kind: str, runs: Any, qwen: Path, tmp_path: Path
) -> None:
    launch(kind, "plain", tmp_path, model=str(qwen))
    base = open_checkpoint(qwen).tensors().keys()
    for folder in ("out/checkpoint-2", "saved"):
        assert open_checkpoint(tmp_path / folder).tensors().keys() - base >= FAULTS[kind]
        assert open_checkpoint(runs(kind).folder / folder).tensors().keys() == base


@pytest.mark.parametrize("kind", KINDS)
def test_saves_keep_the_cache_on(kind: str, runs: Any) -> None:
    folders = [folder for name in ("out/checkpoint-2", "saved") if (folder := runs(kind).folder / name).is_dir()]
    written = [folder for folder in folders if (folder / "config.json").is_file()]
    assert bool(written) == (kind != "fsdp2_sharded")  # which writes shards and no config
    for folder in written:
        config = json.loads((folder / "config.json").read_text())
        assert "use_cache" not in config  # nor has the base
        assert "text_config" not in config
        assert json.loads((folder / "generation_config.json").read_text()).get("use_cache", True) is True


def test_nothing_is_added_where_a_backend_writes_no_model_folder(runs: Any, qwen: Path, tmp_path: Path) -> None:
    launch("fsdp2_sharded", "plain", tmp_path, model=str(qwen))
    plain, ours = (
        sorted(str(path.relative_to(folder)) for path in (folder / "out" / "checkpoint-2").rglob("*"))
        for folder in (tmp_path, runs("fsdp2_sharded").folder)
    )
    assert ours == plain


def test_an_adapters_resume_on_two_processes_is_bit_identical(qwen: Path, tmp_path: Path) -> None:
    report, _ = launch("ddp", "resumes", tmp_path, model=str(qwen), lora=True)
    assert report["base"] == report["plain"] == report["straight"]
    assert report["base_restored"] == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2_full", "fsdp2_sharded", "zero3"])
def test_a_resume_on_two_processes_is_bit_identical(kind: str, qwen: Path, tmp_path: Path) -> None:
    report, _ = launch(kind, "resumes", tmp_path, model=str(qwen))
    assert report["base"] == report["straight"]
    assert report.get("checkpoint", report["straight"]) == report["straight"]
    if kind == "ddp":  # the fault: the trainer alone goes on from the base
        assert report["plain"] != report["straight"]
        assert report["base_restored"] > 0
        assert report["checkpoint_restored"] == 0
    else:  # sharded models have loaders of their own, without the fault, and are left to them
        assert report["plain"] == report["straight"]
        assert report["base_restored"] is None


@pytest.mark.parametrize("kind", ["fsdp2_full", "zero3"])
def test_a_sharded_policy_is_whole_while_it_answers_where_there_is_room(kind: str, qwen: Path, tmp_path: Path) -> None:
    """Gathered once for an answer and not for each token. Asked or not, or in vain: the training goes on the same."""
    runs: dict[str, dict[str, Any]] = {
        "not asked": {"asks": False},
        "whole": {"asks": True},
        "no room": {"asks": True, "has_room": False},
        "one fails": {"asks": True, "failing_ranks": [0]},
        "both fail": {"asks": True, "failing_ranks": [0, 1]},
    }
    found = {
        name: launch(kind, "asked_midway", tmp_path / name, model=str(qwen), **options)
        for name, options in runs.items()
    }
    assert len({reports[0]["digest"] for reports in found.values()}) == 1
    answers = [report["answers"] for name in ("whole", "no room") for report in found[name]]
    assert [len(answer) for answer in answers[0]] == [2, 2, 6]
    assert all(answer == answers[0] for answer in answers)
    for report in found["whole"]:
        assert report["gathers"][2] == report["gathers"][1] > 0
    for report in found["no room"]:
        assert report["gathers"][2] > report["gathers"][1]
    failed = "OSError: [Errno 5] Input/output error"
    assert [report["errors"] for report in found["one fails"]] == [[failed] * 3, [f"PeerError: rank 0: {failed}"] * 3]
    assert [report["errors"] for report in found["both fail"]] == [[failed] * 3] * 2


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_no_rank_publishes_or_waits_when_one_fails(failing_rank: int, qwen: Path, tmp_path: Path) -> None:
    reports = launch("ddp", "one_rank_fails", tmp_path, model=str(qwen), failing_rank=failing_rank)
    said = "finding prompts to verify the export with failed: OSError: [Errno 5] Input/output error"
    assert not (tmp_path / "export").exists()
    for rank, report in enumerate(reports):
        assert (report["step"], report["exported"]) == (2, False)
        assert report["failures"][0] == (said if rank == failing_rank else f"rank {failing_rank}: {said}")
    assert reports[0]["arms"] == {"checkpoint": True}


CUT = {
    "fsdp2_full": ("pytorch_model_fsdp.bin", "pytorch_model_fsdp.bin is cut off"),
    "fsdp2_sharded": ("optimizer_0/.metadata", "optimizer_0 has no .metadata"),
    "zero3_without_gathering": ("latest", "DeepSpeed's file `latest` is missing"),
}


@pytest.mark.parametrize("kind", sorted(CUT))
def test_sharded_checkpoints_are_told_whole_from_half_written(kind: str, runs: Any, tmp_path: Path) -> None:
    checkpoint = runs(kind).folder / "out" / "checkpoint-2"
    assert why_not_whole(checkpoint) is None
    half = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, half)
    name, reason = CUT[kind]
    if name.endswith(".bin"):
        (half / name).write_bytes((half / name).read_bytes()[:-100])
    else:
        (half / name).unlink()
    assert why_not_whole(half) == reason
    if kind.startswith("zero"):
        shutil.copyfile(checkpoint / "latest", half / "latest")
        next(half.glob("global_step2/*_optim_states.pt")).unlink()
        assert why_not_whole(half) == "global_step2 has the optimizer of 1 ranks, and 2 trained"
