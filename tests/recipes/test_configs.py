"""Every config is read by the parsers that will read it for a user, and says why it is not the default."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from grpo_toolkit import InputError

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))
ON_A_CPU = ("--use_cpu", "true", "--bf16", "false")  # CPU machines refuse bf16; the rest is taken as it is.

# What a run is, rather than how it is set.
NAMES = {"model_name_or_path", "dataset_name", "output_dir", "use_peft", "seed"}


def parse(*paths: Path, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    from grpo_vlm.arguments import parse as parse_arguments

    configs = [part for path in paths for part in ("--config", str(path))]
    given = [] if any(not path.stem.startswith("with_") for path in paths) else ["--model_name_or_path", "m"]
    recipe, training, model = parse_arguments([*configs, *given, *ON_A_CPU, *flags])
    return {**vars(training), **vars(model), **vars(recipe)}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_taken_as_written(config: Path) -> None:
    merged = parse(config)
    for key, value in yaml.safe_load(config.read_text()).items():
        if key not in ("bf16", "report_to"):
            assert getattr(merged[key], "value", merged[key]) == value, key
    assert merged["gradient_checkpointing"]


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "tiny"], ids=lambda path: path.stem)
def test_what_is_not_a_default_has_its_reason_beside_it(config: Path, tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("model_name_or_path: m\n")
    defaults = parse(tmp_path / "defaults.yaml")
    lines = config.read_text().splitlines()
    for key, value in yaml.safe_load("\n".join(lines)).items():
        if key in NAMES:
            continue
        at = next(index for index, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert "# " in lines[at] or lines[at - 1].startswith("# "), f"{key}: why?"
        assert getattr(defaults[key], "value", defaults[key]) != value, f"{key}: is the default, leave it out"


@pytest.mark.parametrize("base", ["qwen2_5_vl_3b_lora", "qwen2_5_vl_3b_full"])
def test_configs_can_be_laid_over_each_other_and_flags_win(base: str) -> None:
    paths = (RECIPES / "configs" / f"{base}.yaml", RECIPES / "configs" / "with_vllm_colocate.yaml")
    merged = parse(*paths, flags=("--max_pixels", "100352", "--vllm_gpu_memory_utilization", "0.2"))
    assert merged["use_vllm"] is True
    assert merged["vllm_max_model_length"] == merged["max_prompt_length"] + merged["max_completion_length"]
    assert (merged["max_pixels"], merged["vllm_gpu_memory_utilization"]) == (100352, 0.2)
    assert merged["eval_steps"] == merged["save_steps"]  # every evaluated model has a checkpoint


@pytest.mark.parametrize("evaluates", ["no", "steps"])
def test_groups_that_do_not_fit_are_an_error_of_the_training_alone(evaluates: str) -> None:
    """No evaluation of this recipe has groups: its batch may be any."""
    tiny = RECIPES / "configs" / "tiny.yaml"
    parse(tiny, flags=("--eval_strategy", evaluates, "--per_device_eval_batch_size", "5"))
    with pytest.raises(InputError, match=r"^generation_batch_size .* --num_generations 4 or 8, or 3 times") as raised:
        parse(tiny, flags=("--eval_strategy", evaluates, "--num_generations", "6"))
    assert "eval" not in str(raised.value)


def test_a_second_config_must_be_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list\.yaml: not a mapping of settings"):
        parse(CONFIGS[0], tmp_path / "list.yaml")


def test_a_second_config_has_no_setting_that_there_is_not(tmp_path: Path) -> None:
    """As a flag `--max_step` would be taken for the beginning of another."""
    (tmp_path / "typo.yaml").write_text("max_step: 3\n")
    with pytest.raises(InputError, match=r"typo\.yaml: there is no setting 'max_step'; did you mean max_steps\?"):
        parse(CONFIGS[0], tmp_path / "typo.yaml")


def test_a_config_may_set_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's parser sets those under `env`."""
    monkeypatch.setenv("GRPO_RECIPE_TEST", "before")
    (tmp_path / "env.yaml").write_text("env: {GRPO_RECIPE_TEST: after}\nmax_steps: 3\n")
    assert parse(tmp_path / "env.yaml", flags=("--model_name_or_path", "m"))["max_steps"] == 3
    assert os.environ["GRPO_RECIPE_TEST"] == "after"


def test_the_adapter_config_names_no_module_of_the_vision_tower(qwen: Path) -> None:
    from grpo_toolkit.model.load import load_model

    config = yaml.safe_load((RECIPES / "configs" / "qwen2_5_vl_3b_lora.yaml").read_text())
    model = load_model(qwen)[0]
    hit = [name for name, _ in model.named_modules() if re.fullmatch(config["lora_target_modules"], name)]
    assert len(hit) == 7 * model.config.text_config.num_hidden_layers
    assert not any("visual" in name for name in hit)


@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(config: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    loaded = load_config_from_file(str(config))  # raises for an unknown key
    assert loaded.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "recipes/grpo.py"])
    launched, _, _ = _validate_launch_command(arguments)
    wanted = {"single": (False, False), "ddp": (False, False), "zero2": (False, True), "zero3": (False, True)}
    assert (launched.use_fsdp, launched.use_deepspeed) == wanted.get(config.stem, (True, False))
    if launched.use_fsdp:
        assert launched.fsdp_version in (2, "2")
        assert launched.fsdp_state_dict_type == "FULL_STATE_DICT"
    if config.stem == "zero3":
        assert launched.zero3_save_16bit_model in (True, "true")


def test_the_vllm_server_gets_the_pixel_limit_of_the_configs() -> None:
    """`trl vllm-serve` passes on what it does not know; the script's own flags must survive that."""
    from trl.scripts.vllm_serve import build_command, make_parser

    script = (RECIPES / "launch" / "vllm_server.sh").read_text()
    command = script[script.index("exec trl vllm-serve") :].replace("\\\n", " ").replace("exec trl vllm-serve", "")
    config = parse(RECIPES / "configs" / "qwen2_5_vl_3b_full.yaml")
    model, max_pixels, max_length = re.findall(r"\$\{\d:-(.+)\}", script)
    assert model == config["model_name_or_path"]
    assert int(max_pixels) == config["max_pixels"]
    assert int(max_length) == config["max_prompt_length"] + config["max_completion_length"]
    filled = command.replace("$model", model).replace("$max_length", max_length).replace("$max_pixels", max_pixels)
    arguments, extra = make_parser().parse_args_and_config(shlex.split(filled), return_remaining_strings=True)
    built = build_command(arguments, extra)
    assert built[built.index("--mm-processor-kwargs") + 1] == '{"max_pixels": 401408}'
    assert built[built.index("--max-model-len") + 1] == "2048"
    assert "--weight-transfer-config" in built


@pytest.mark.parametrize("script", ["vllm_server.sh", "slurm.sbatch"])
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(RECIPES / "launch" / script)], check=True)


def test_the_slurm_script_starts_every_machine_with_its_own_rank(tmp_path: Path) -> None:
    """Run for real, with stand-ins for Slurm's two commands and for accelerate, which print what they are given."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-a\necho node-b\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done\n')
    (tmp_path / "accelerate").write_text("#!/bin/sh\nprintf '%s ' \"$@\"; echo\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_RESTART_COUNT": "1",
    }
    command = ["bash", str(RECIPES / "launch" / "slurm.sbatch"), "--config", "a b.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --num_processes 8 --machine_rank {rank} --main_process_ip node-a" in line
        assert line.rstrip().endswith("recipes/grpo.py --config a b.yaml --resume_from_checkpoint auto")
