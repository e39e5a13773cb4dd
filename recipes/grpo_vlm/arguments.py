"""The recipe's own settings, and how they are parsed next to TRL's.

Every field of `RecipeArguments`, `GRPOConfig` and `ModelConfig` is a flag and a YAML key. With neither `--config`
nor `--model_name_or_path`, `configs/tiny.yaml` is taken: the embedded model and data, which need no download.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from grpo_toolkit import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"

TYPED_FOR = {
    "beta": "kl kl_coef",
    "dataset_name": "data data_path dataset dataset_path",
    "gradient_accumulation_steps": "accumulation grad_accum",
    "held_out_size": "eval_size test_size",
    "image_folder": "image_path image_root images",
    "learning_rate": "lr",
    "load_in_4bit": "qlora quantize",
    "lora_r": "lora_rank",
    "max_completion_length": "max_length max_new_tokens max_tokens",
    "max_steps": "steps",
    "model_name_or_path": "base base_model model model_name model_path",
    "num_generations": "group_size n_generations num_samples",
    "num_train_epochs": "epochs num_epochs",
    "optim": "optimizer",
    "output_dir": "out output output_path save_dir",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch batch_size bs train_batch_size",
    "report_to": "logger tracker wandb",
    "resume_from_checkpoint": "resume",
    "reward_funcs": "reward rewards",
    "use_peft": "adapter lora peft",
    "use_vllm": "vllm",
}
"""Words that people type, and the setting that they mean by it; typing errors are found without."""

TYPED_FOR_ACCELERATE = "gpu gpus n_gpus nproc_per_node num_gpus num_machines num_nodes num_processes"
"""Typed where they come too late: `accelerate launch` starts the processes."""


@dataclass
class RecipeArguments(ScriptArguments):
    """The settings that the recipe adds to TRL's script arguments."""

    export_dir: str | None = field(
        default=None, metadata={"help": "Where to publish the export. Default: `export` in output_dir."}
    )
    held_out_size: int = field(
        default=200, metadata={"help": "Rows on which accuracy is measured before and after training."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "The dataset's column with the question, if it has no usual name."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "The dataset's column with the image, if it has no usual name."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "The dataset's column with the answer, if it has no usual name."}
    )
    dataset_layout: str | None = field(
        default=None,
        metadata={"help": "For a local copy of a known dataset: open_r1, clevr_count, geometry3k or referring."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Where a dataset's image paths start, if it has paths instead of images."}
    )
    max_pixels: int | None = field(
        default=None,
        metadata={
            "help": "The most pixels of an image, in training, rollouts and the saved processor; 784 pixels are one "
            "token of Qwen2.5-VL. Default: the model's own limit."
        },
    )
    min_pixels: int | None = field(
        default=None,
        metadata={
            "help": "The fewest pixels of an image, which smaller ones are enlarged to, in training, rollouts and the "
            "saved processor. Default: the model's own limit."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Rows with a longer prompt (tokens, image included) are left out, never cut."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of rewards.py, or functions of your own as path/to/file.py:function. Default: those that "
            "suit the dataset. Weigh them with --reward_weights."
        },
    )
    latency_new_tokens: int = field(
        default=64, metadata={"help": "Tokens generated per request when latency is measured."}
    )
    packed_vision: bool = field(
        default=True,
        metadata={
            "help": "One attention call a layer in the vision tower, and each distinct image once, equal but for "
            "rounding (PackedVisionCallback)."
        },
    )
    fast_rollouts: bool = field(
        default=True,
        metadata={
            "help": "Rollouts compiled and prefilled once a prompt, on a GPU with room for a copy of the weights "
            "(FastRolloutCallback)."
        },
    )
    direct_baseline: bool = field(
        default=False,
        metadata={"help": "Before training, also measure the base when it is asked for the answer alone."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything, print the plan with its memory and disk, and stop."}
    )
    verbose: bool = field(
        default=False,
        metadata={"help": "Print everything: the whole plan, every log, other libraries' bars and warnings."},
    )
    step_time: bool = field(
        default=True,
        metadata={"help": "Say where a step's time goes, and why: step_time.jsonl and step_time.html in output_dir."},
    )
    latency_rounds: int = field(
        default=24, metadata={"help": "Measured requests per arm, at most; 0 skips the measurement."}
    )


class _Parser(TrlParser):  # type: ignore[misc]
    """A parser like TRL's that prints one line about an error instead of its very long usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists every setting")


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, GRPOConfig, ModelConfig]:
    """Parse flags and YAML into the three groups.

    Raises:
        InputError: a config file that is not there, an unknown key, or values that do not fit together.
    """
    args = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args and not any(arg.partition("=")[0] == "--model_name_or_path" for arg in args):
        args = ["--config", str(DEFAULT_CONFIG), *args]
    # Not abbreviated: what is nearly a setting is a mistake.
    parser = _Parser((RecipeArguments, GRPOConfig, ModelConfig), allow_abbrev=False)
    parser.set_defaults(num_generations_eval=1)  # AccuracyTrainer evaluates without groups: any batch will do.
    try:
        recipe, training, model = parser.parse_args_and_config(_one_config(args))
    except yaml.YAMLError as error:
        raise InputError(f"--config: not valid YAML ({_explain(str(error))})") from error
    except ValueError as error:  # GRPOConfig checks batch sizes when it is made; the parser unknown flags
        raise InputError(_explain(str(error))) from error
    return recipe, training, model


def _one_config(args: list[str]) -> list[str]:
    """Return arguments with one `--config` for TRL's parser; keys of further ones become flags, before those given.

    Raises:
        InputError: a config that is not there, or is no mapping.
    """
    configs, flags = [], []
    rest = iter(args)
    for arg in rest:
        if arg == "--config":
            configs.append(Path(next(rest, "")))
        else:
            flags.append(arg)
    for path in configs:
        if not path.is_file():
            raise InputError(f"--config {path}: no such file; see recipes/configs/")
    laid_over: list[str] = []
    for position, path in enumerate(configs):
        content = _settings(path, others=("env",) if position == 0 else ())
        if position == 0:  # TRL's parser reads it, and sets the environment variables in it
            continue
        for key, value in content.items():
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            laid_over += [f"--{key}", *map(str, values)]
    first = ["--config", str(configs[0])] if configs else []
    return [*first, *laid_over, *flags]


def _settings(path: Path, *, others: Sequence[str]) -> dict[str, object]:
    """Return a config's keys and values.

    Raises:
        InputError: it is no mapping, or has a key that is no setting.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: not a mapping of settings (key: value)")
    for key in content:
        if key not in _names() and key not in others:
            raise InputError(f"--config {path}: there is no setting {key!r}{_nearest(str(key))}")
    return content


def _names() -> list[str]:
    return [known.name for kind in (RecipeArguments, GRPOConfig, ModelConfig) for known in fields(kind)]


def _nearest(name: str, *, dashes: str = "") -> str:
    """Return the setting that may be meant, after these words, or where to look."""
    name = name.replace("-", "_").lower()
    if name in TYPED_FOR_ACCELERATE.split():
        return "; how many processes is for accelerate: accelerate launch --num_processes 2 recipes/grpo.py ..."
    found = [setting for setting, typed in TYPED_FOR.items() if name in typed.split()]
    found = found or difflib.get_close_matches(name, _names(), n=1)
    return f"; did you mean {dashes}{found[0]}?" if found else "; --help lists every setting"


def _explain(message: str) -> str:
    """Return a library's complaint in one line, with the way out."""
    line = " ".join(message.split())
    unused = re.search(r"not used by the HfArgumentParser: \['(--?)([^'=]+)", line)
    if unused is not None:
        return f"there is no flag {unused[1]}{unused[2]}{_nearest(unused[2], dashes='--')}"
    batch = re.search(r"generation_batch_size \((\d+)\) must be divisible by num_generations \((\d+)\)", line)
    if batch is not None:
        return f"{line} {_batch_fix(int(batch[1]), int(batch[2]))}"
    if "eval batch size" in line:
        return f"{line} Make --per_device_eval_batch_size a multiple of it."
    if "bf16" in line:
        return f"{line} On a machine without a GPU: --use_cpu true --bf16 false"
    return line


def _batch_fix(completions: int, generations: int) -> str:
    """Return what to set instead, in numbers: the completions of one prompt must be scored together."""
    divisors = [count for count in range(2, completions + 1) if completions % count == 0]
    nearest = sorted(divisors, key=lambda count: (abs(count - generations), count))[:2]
    steps = generations // math.gcd(completions, generations)
    ways = [f"--num_generations {' or '.join(map(str, sorted(nearest)))}"] if nearest else []
    ways.append(f"{steps} times the --gradient_accumulation_steps (then {completions * steps} completions a step)")
    return f"The completions of one prompt must be scored together: {', or '.join(ways)}."
