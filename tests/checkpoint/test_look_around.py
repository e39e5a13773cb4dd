"""The look into, below and above a folder: the same answer for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.look_around import around, look_around, models_below, shards_of
from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint, diagnose_run
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.merge.adapter import find_adapter

if TYPE_CHECKING:
    from pathlib import Path

VERL = "run/global_step_60/actor"
# Files, the folders from which they are found, the folder of the shards, what its name and its command say.
LAYOUTS = {
    "verl": ([f"{VERL}/model_world_size_2_rank_0.pt", f"{VERL}/huggingface/config.json", "run/global_step_60/data.pt",
              "run/global_step_60/critic/model_world_size_2_rank_0.pt", "run/latest_checkpointed_iteration.txt"],
             ["run", "run/global_step_60", VERL, f"{VERL}/huggingface"], VERL, "verl",
             "verl.model_merger merge --backend fsdp"),
    "verl on Megatron": ([f"{VERL}/dist_ckpt/__0_0.distcp", f"{VERL}/huggingface/config.json"],
                         ["run", VERL], VERL, "verl", "--backend megatron"),
    "Megatron": (["run/iter_0000100/__0_0.distcp", "run/iter_0000100/common.pt", "run/iter_0000100/metadata.json"],
                 ["run", "run/iter_0000100"], "run/iter_0000100", "Megatron-core", "Megatron-Bridge"),
    "ms-swift": (["run/iter_0000100/__0_0.distcp", "run/iter_0000100/common.pt", "run/args.json"],
                 ["run", "run/iter_0000100"], "run/iter_0000100", "ms-swift", "swift export --mcore_model"),
    "Megatron, older": (["run/iter_0000100/mp_rank_00/model_optim_rng.pt"], ["run"], "run/iter_0000100",
                        "one file a rank", "tools/checkpoint/convert.py"),
    "torchtitan": (["run/checkpoint/step-500/__0_0.distcp", "run/checkpoint/step-500/.metadata"],
                   ["run", "run/checkpoint/step-500"], "run/checkpoint/step-500", "torchtitan", "convert_to_hf.py"),
    "DCP": (["run/weights/__0_0.distcp", "run/weights/.metadata"], ["run", "run/weights"], "run/weights",
            "torch.distributed checkpoint", "dcp_to_torch"),
    "NeMo": (["run/context/model.yaml", "run/weights/__0_0.distcp", "run/weights/metadata.json"], ["run"], "run",
             "NeMo", "llm.export_ckpt"),
    "NeMo-RL": (["run/step_10/policy/weights/__0_0.distcp", "run/step_10/policy/weights/.metadata",
                 "run/step_10/config.yaml", "run/step_10/training_info.json"],
                ["run", "run/step_10", "run/step_10/policy", "run/step_10/policy/weights"], "run/step_10", "NeMo-RL",
                "convert_dcp_to_hf.py"),
    "accelerate": (["run/checkpoint-2/pytorch_model_fsdp_0/__0_0.distcp", "run/checkpoint-2/trainer_state.json"],
                   ["run/checkpoint-2"], "run/checkpoint-2", "FSDP", "accelerate merge-weights"),
    "accelerate, inside": (["checkpoint-2/pytorch_model_fsdp_0/__0_0.distcp"], ["checkpoint-2/pytorch_model_fsdp_0"],
                           "checkpoint-2/pytorch_model_fsdp_0", "FSDP", "accelerate merge-weights"),
    "DeepSpeed": (["run/global_step60/mp_rank_00_model_states.pt", "run/latest", "run/zero_to_fp32.py"], ["run"],
                  "run", "ZeRO", "deepspeed.utils.zero_to_fp32"),
    "DeepSpeed, inside": (["run/global_step60/zero_pp_rank_0_mp_rank_00_model_states.pt"], ["run/global_step60"],
                          "run/global_step60", "ZeRO", "deepspeed.utils.zero_to_fp32"),
    "DeepSpeed, universal": (["run/global_step60_universal/zero/w/fp32.pt",
                              "run/global_step60_universal/mp_rank_00_model_states.pt"],
                             ["run", "run/global_step60_universal"], "run/global_step60_universal", "universal",
                             "zero_to_fp32"),
}  # fmt: skip


def write(root: Path, files: list[str]) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_names_a_trainers_shards_from_every_level(layout: str, tmp_path: Path) -> None:
    files, levels, home, name, command = LAYOUTS[layout]
    write(tmp_path, files)
    for level in levels:
        shards = shards_of(tmp_path / level)
        assert shards is not None
        assert shards.path == tmp_path / home
        assert name in shards.what
        assert command in shards.command
        assert str(tmp_path) in shards.command or layout == "DeepSpeed, universal"
        with pytest.raises(CheckpointError, match="holds") as raised:  # verify and export begin with it
            open_checkpoint(tmp_path / level)
        assert shards.command in str(raised.value)
        with pytest.raises(CheckpointError) as raised:  # merge
            find_adapter(tmp_path / level)
        assert shards.command in str(raised.value)
        (found,) = diagnose_checkpoint(tmp_path / level).findings[:1]
        assert found.severity.value == "unloadable"
        assert shards.command in found.expected


def test_only_accelerates_own_shards_are_sent_to_accelerate(tmp_path: Path) -> None:
    for layout, (files, levels, *_) in LAYOUTS.items():
        root = tmp_path / layout
        write(root, files)
        sends = [
            "accelerate merge-weights" in shards.command for level in levels if (shards := shards_of(root / level))
        ]
        assert sends == [layout.startswith("accelerate")] * len(levels)


def test_adapters_with_names_of_their_own_are_found(tmp_path: Path) -> None:
    write(tmp_path, [f"checkpoint-20/{name}/adapter_config.json" for name in ("policy", "reference")])
    checkpoint = tmp_path / "checkpoint-20"
    names = [checkpoint / name for name in ("policy", "reference")]
    assert models_below(checkpoint) == names
    assert "adapters policy, reference" in around(checkpoint)
    with pytest.raises(CheckpointError, match="adapters policy, reference"):
        open_checkpoint(checkpoint)
    for folder in (checkpoint, tmp_path):  # the checkpoint itself, and the run that it belongs to
        diagnoses, empty = diagnose_run(folder)
        assert [diagnosis.path for diagnosis in diagnoses] == names
        assert empty == []


def test_a_model_one_level_down_is_named_and_the_newest_checkpoint_first(tmp_path: Path) -> None:
    write(tmp_path, [f"run/checkpoint-{number}/config.json" for number in (9, 20)] + ["export/merged/config.json"])
    for folder, meant in (("run", "run/checkpoint-20"), ("export", "export/merged")):
        with pytest.raises(CheckpointError, match="did you mean") as raised:
            open_checkpoint(tmp_path / folder)
        assert str(raised.value).endswith(f"did you mean {tmp_path / meant}?")


def test_a_model_with_weights_is_itself_whatever_lies_around_it(tmp_path: Path) -> None:
    write(tmp_path, [f"{VERL}/model_world_size_2_rank_0.pt", f"{VERL}/huggingface/config.json"])
    write(tmp_path, [f"{VERL}/huggingface/model.safetensors"])
    folder = tmp_path / VERL / "huggingface"
    assert shards_of(folder) is None
    assert [place.kind for place in look_around(folder)] == [Kind.MODEL]
    assert open_checkpoint(folder).kind is Kind.MODEL


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, ["elsewhere/config.json", "run/notes.txt"])
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    assert look_around(tmp_path / "run") == []
    assert look_around(tmp_path / "nowhere") == []
