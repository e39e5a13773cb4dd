"""The preflight of a run: an estimate of memory close to what PyTorch allocates, and errors that are certain."""

from __future__ import annotations

import inspect
import os
import re
import sys
import weakref
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_toolkit import InputError, RolloutSize
from tests.recipes.test_data import picture, write_parquet
from tests.support.warm import run_python

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LANGUAGE_MODEL = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Allocations(TorchDispatchMode):
    """A counter of the storages that operations allocate, until they are freed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.current -= self.known.pop(key)


def small_qwen(folder: Path) -> Path:
    """Wide enough for activations to outweigh the rest, small enough to train on a CPU for a test."""
    from scripts.models.random_vlm import SHAPES, full_size_tokenizer
    from scripts.models.tiny_vlm_files import Shape, write_model_files, write_tokenizer

    folder.mkdir()
    shape = Shape(
        hidden_size=256,
        intermediate_size=1376,  # the 3B's ratio
        num_layers=6,
        num_heads=4,
        num_kv_heads=1,
        mrope_section=(8, 12, 12),
        vision_depth=2,
        vision_hidden_size=SHAPES["tiny"].vision_hidden_size,
        vision_intermediate_size=128,
        vision_num_heads=4,
        fullatt_block_indexes=(1,),
    )
    token_ids = write_tokenizer(folder, full_size_tokenizer())
    write_model_files(folder, shape=shape, token_ids=token_ids, vocab_size=151_936)
    return folder


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_estimate_is_close_to_what_a_step_allocates(tmp_path: Path, adapter: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    from grpo_vlm.planning.memory import Load, estimate, measure_model

    folder, batch, length = small_qwen(tmp_path / "model"), 4, 256
    lora = LoraConfig(r=8, lora_dropout=0.0, target_modules=LANGUAGE_MODEL) if adapter else None
    dtype = torch.bfloat16 if adapter else torch.float32
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    layers = model.model.language_model
    if lora is not None:
        model = get_peft_model(model, lora)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter:
        model.enable_input_require_grads()
    ids = torch.zeros(batch, length, dtype=torch.long)
    with Allocations(model) as allocations:
        for _ in range(2):  # The first backward makes the gradients, the second adds to them.
            allocations.peak = allocations.current
            with torch.autocast("cpu", dtype=torch.bfloat16):
                position = torch.zeros(3, batch, length, dtype=torch.long)
                hidden = layers(input_ids=ids, position_ids=position, use_cache=False).last_hidden_state
            hidden.sum().backward()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)

    size = measure_model(str(folder), peft_config=lora)
    load = Load(
        prompt_tokens=length // 2,
        image_patches=0,
        completion_tokens=length // 2,
        training_batch=batch,
        rollout_batch=batch,
    )
    found = estimate(size, load, weight_bytes=dtype.itemsize, mixed_precision=True, optimizer="adamw_torch_fused")
    assert found.parts["gradients"] >= gradients > 0
    assert found.moments["training"] == pytest.approx(allocations.peak - gradients, rel=0.15)


def test_counts_are_exact(tmp_path: Path) -> None:
    from peft import LoraConfig

    from grpo_vlm.planning.memory import measure_model
    from scripts.models.random_vlm import SHAPES, full_size_tokenizer
    from scripts.models.tiny_vlm_files import write_model_files, write_tokenizer

    token_ids = write_tokenizer(tmp_path, full_size_tokenizer())
    write_model_files(tmp_path, shape=SHAPES["qwen2.5-vl-3b"], token_ids=token_ids, vocab_size=151_936)
    size = measure_model(str(tmp_path), peft_config=LoraConfig(r=64, target_modules=LANGUAGE_MODEL))
    assert (size.parameters, size.trained) == (3_754_622_976, 119_734_272)
    assert size.rollouts.kv_values_per_token * 2 == 36_864  # bytes in bfloat16
    assert (size.adapted_modules, size.adapted_vision_modules) == (252, 0)
    everywhere = measure_model(str(tmp_path), peft_config=LoraConfig(target_modules=["gate_proj"]))
    assert (everywhere.adapted_modules, everywhere.adapted_vision_modules) == (68, 32)
    with pytest.raises(InputError, match="--lora_target_modules: Target modules"):
        measure_model(str(tmp_path), peft_config=LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    ("adapted", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "--lora_target_modules: they hit the output layer"),
        (
            {"target_modules": LANGUAGE_MODEL, "modules_to_save": ["lm_head"]},
            "--lora_modules_to_save: the base ties lm_head to embed_tokens",
        ),
    ],
)
def test_an_adapter_leaves_the_output_layer_alone(qwen: Path, adapted: dict[str, Any], message: str) -> None:
    """TRL refuses the one, and no export can be made from the other."""
    from peft import LoraConfig

    from grpo_vlm.planning.memory import measure_model

    with pytest.raises(InputError, match=message):
        measure_model(str(qwen), peft_config=LoraConfig(**adapted))


def plan_of(model: Path, dataset: Path, tmp_path: Path, *flags: str) -> Any:
    from grpo_vlm.arguments import parse
    from grpo_vlm.data.image_sizes import load_processor
    from grpo_vlm.data.rows import load_splits
    from grpo_vlm.planning.plan import make_plan

    given = (
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        str(dataset),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    )
    recipe, training, arguments = parse([*given, "--output_dir", str(tmp_path / "out"), *flags])
    processor = load_processor(str(model), min_pixels=recipe.min_pixels, max_pixels=recipe.max_pixels)
    splits = load_splits(recipe, seed=0, processor=processor)
    return make_plan(recipe, training, arguments, splits, processor=processor)


def test_a_plan_counts_prompts_tokens_and_disk(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    plan = plan_of(
        *(qwen, geometry, tmp_path, "--max_pixels", "100352", "--per_device_train_batch_size", "4"),
        *("--num_generations", "4", "--gradient_accumulation_steps", "2", "--max_steps", "6", "--save_steps", "2"),
    )
    assert (plan.prompts_per_step, plan.completions_per_step, plan.steps) == (2, 8, 6)
    assert plan.prompt_tokens == 13 * 9 + plan.prompt_tokens - 117  # 364 x 252 pixels are 117 tokens
    assert plan.prompt_tokens > 117
    weights = plan.size.parameters * 4
    assert plan.disk == 3 * 3 * weights + plan.size.parameters * 2 + weights
    assert (plan.errors, plan.warnings) == ((), ())
    assert not (tmp_path / "out").exists()


def test_enlarged_images_count_as_large_as_they_become(qwen: Path, tmp_path: Path) -> None:
    columns = {"images": [[picture(60, 40)]] * 4, "problem": ["<image>Find x."] * 4, "answer": ["3"] * 4}
    write_parquet(tmp_path / "geometry3k", columns, several=True)
    plans = [
        plan_of(qwen, tmp_path / "geometry3k", tmp_path, "--per_device_train_batch_size", "8", *flags)
        for flags in ((), ("--min_pixels", "262144"))
    ]
    small, large = 3 * 2, 23 * 15  # 84 x 56 (the model's own minimum is 56 x 56), and 644 x 420 pixels
    assert plans[1].prompt_tokens - plans[0].prompt_tokens == large - small


def test_a_step_is_counted_whole_where_it_takes_several_rollouts(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    flags = ("--per_device_train_batch_size", "4", "--num_generations", "4", "--gradient_accumulation_steps", "8")
    plan = plan_of(qwen, geometry, tmp_path, *flags, "--steps_per_generation", "4", "--max_steps", "2")
    assert (plan.prompts_per_step, plan.completions_per_step, plan.prompts_per_rollout) == (8, 32, 4)
    assert "each step   8 prompts, 32 completions; 2 steps" in plan.lines()
    assert plan.errors == ()  # four rows fill a rollout


def test_the_longest_prompt_is_that_of_all_rows(qwen: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    from grpo_vlm.data.image_sizes import load_processor
    from grpo_vlm.data.prompt_lengths import Longest, longest_prompt, measure

    prompts = [[{"role": "user", "content": "x"}]] * 400
    prompts[300] = [{"role": "user", "content": "x y " * 500}]
    images = [picture(56, 56)] * 399 + [picture(280, 280)]
    kinds = {"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()}
    rows = Dataset.from_dict({"prompt": prompts, "image": images}, features=Features(kinds))
    processor = load_processor(str(qwen), max_pixels=None)
    measured = measure(rows, processor, every_length=False)
    assert longest_prompt(rows, measured, processor) == Longest(
        prompt_tokens=measured[300].prompt_tokens or 0, image_tokens=100
    )
    assert measured[300].prompt_tokens > measured[399].prompt_tokens > measured[0].prompt_tokens  # type: ignore[operator]


def test_a_row_is_measured_once_for_loader_and_plan(
    qwen: Path, geometry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the header and at the tokenizer, the two that take the time."""
    from grpo_vlm.data import prompt_lengths
    from grpo_vlm.data.image_sizes import load_processor

    headers, texts = [], []
    look_at, tokenizer = prompt_lengths.look_at, type(load_processor(str(qwen)).tokenizer)
    tokenise = tokenizer.__call__

    def counted_look(*args: Any, **kwargs: Any) -> Any:
        headers.append(args)
        return look_at(*args, **kwargs)

    def counted_tokenise(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        texts.extend([text] if isinstance(text, str) else text)
        return tokenise(self, text, *args, **kwargs)

    monkeypatch.setattr(prompt_lengths, "look_at", counted_look)
    monkeypatch.setattr(tokenizer, "__call__", counted_tokenise)
    plan_of(qwen, geometry, tmp_path, "--max_prompt_length", "4096")
    assert len(headers) == 4 + 4  # train and test
    assert len(texts) == 1 + 1  # all of a split ask the same


def test_held_out_rows_whose_images_are_trained_on_are_a_warning(qwen: Path, tmp_path: Path) -> None:
    """No row is moved where the dataset itself says which rows are held out."""
    for split, pictures in (("train", [picture(), picture(56, 56)]), ("test", [picture(84, 84), picture(56, 56)])):
        columns = {"images": [[one] for one in pictures], "problem": ["Find x."] * 2, "answer": ["3"] * 2}
        write_parquet(tmp_path / "geometry3k", columns, split=split, several=True)
    flags = ("--per_device_train_batch_size", "4", "--num_generations", "4")
    plan = plan_of(qwen, tmp_path / "geometry3k", tmp_path, *flags)
    assert [text.partition(":")[0] for text in plan.warnings] == [
        "1 of 2 held-out rows show an image that is trained on"
    ]


def test_another_familys_prompts_are_processed_for_their_length(any_base: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    from grpo_vlm.data.image_sizes import decoded, load_processor
    from grpo_vlm.data.prompt_lengths import longest_prompt, measure
    from grpo_vlm.training.evaluation import model_inputs

    prompts = [[{"role": "user", "content": "x " * count}] for count in (1, 40, 7)]
    kinds = {"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()}
    images = [picture(56, 56)] * 3
    rows = Dataset.from_dict({"prompt": prompts, "image": images}, features=Features(kinds))
    processor = load_processor(str(any_base))
    lengths = [model_inputs([row], processor)["input_ids"].shape[1] for row in decoded(rows)]
    measured = measure(rows, processor, every_length=True)
    assert [row.prompt_tokens for row in measured] == lengths
    for every in (True, False):
        longest = longest_prompt(rows, measure(rows, processor, every_length=every), processor)
        assert longest.prompt_tokens == max(lengths)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            ["--num_generations", "2", "--per_device_train_batch_size", "16"],
            {},
            "4 rows to train on, but each rollout takes 8 prompts (16 completions, 2 of each): lower --per_dev",
        ),
        (["--reward_weights", "1"], {}, "--reward_weights: 1 for 2 rewards (format, accuracy); give one for each"),
        (
            ["--eval_strategy", "steps", "--metric_for_best_model", "eval_acuracy"],
            {},
            "--metric_for_best_model eval_acuracy: an evaluation measures eval_accuracy and eval_runtime",
        ),
        (["--loss_type", "grop"], {}, "--loss_type grop: there are grpo, dr_grpo, dapo"),
        (["--report_to", "tensorbord"], {}, "--report_to tensorbord: there are azure_ml, "),
        (
            [],
            {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "fsdp_state_dict_type SHARDED_STATE_DICT: checkpoints get no config, tokenizer or safetensors",
        ),
    ],
)
def test_what_is_bound_to_fail_is_an_error(
    qwen: Path,
    geometry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    from grpo_vlm.planning.plan import check_plan

    plan = plan_of(qwen, geometry, tmp_path, *flags)
    assert plan.errors == () or not environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plan = plan_of(qwen, geometry, tmp_path, *flags)
    assert message in plan.errors[0]
    with pytest.raises(InputError):
        check_plan(plan)


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy"])
def test_the_metric_of_an_evaluation_is_taken(qwen: Path, geometry: Path, tmp_path: Path, metric: str) -> None:
    flags = ("--eval_strategy", "steps", "--metric_for_best_model", metric, "--reward_weights", "1", "0.5")
    assert plan_of(qwen, geometry, tmp_path, *flags).errors == ()


@pytest.mark.parametrize(
    ("package", "flags", "message"),
    [
        ("bitsandbytes", ["--optim", "adamw_8bit"], "--optim adamw_8bit: bitsandbytes is not installed here"),
        ("bitsandbytes", ["--load_in_4bit", "true"], "--load_in_4bit: bitsandbytes is not installed here"),
        ("mlflow", ["--report_to", "mlflow"], "--report_to mlflow: not installed here"),
        ("math_verify", [], "answers that are formulas: math-verify is not installed here"),
    ],
)
def test_a_package_that_is_missing_is_an_error_or_in_a_dry_run_a_warning(
    qwen: Path,
    geometry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    flags: list[str],
    message: str,
) -> None:
    if package == "math_verify":
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    elif find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert message in plan_of(qwen, geometry, tmp_path, *flags).errors[0]
    elsewhere = plan_of(qwen, geometry, tmp_path, *flags, "--dry_run", "true")
    assert elsewhere.errors == ()
    assert message in elsewhere.warnings[0]


def test_losses_and_optimizers_are_those_of_the_libraries() -> None:
    from transformers.training_args import OptimizerNames
    from trl import GRPOTrainer

    from grpo_vlm.planning.preflight import LOSS_TYPES, needs_bitsandbytes

    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]+\]|\"\w+\")", inspect.getsource(GRPOTrainer))
    assert set(re.findall(r"\w+", " ".join(compared))) == set(LOSS_TYPES)
    optimizers = pytest.importorskip("transformers.trainer_optimizer")
    theirs = {name for name in OptimizerNames if needs_bitsandbytes(name.value)}
    assert theirs == set(optimizers._BITSANDBYTES_OPTIMIZERS)


def test_zero3_without_whole_weights_is_an_error(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    """In a process of its own, as `accelerate launch` would start it: DeepSpeed opens a process group at once."""
    pytest.importorskip("deepspeed")
    launched = {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"},
        **{"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    }
    command: list[object] = [RECIPES / "grpo.py", "--model_name_or_path", qwen, "--dry_run"]
    command += ["--dataset_name", geometry, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    command += ["--bf16", "false", "--gradient_checkpointing", "false"]
    done = run_python(command, env=os.environ | launched)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "processes   1 (zero3)" in done.stdout
    assert "ZeRO-3 without zero3_save_16bit_model: checkpoints get no weights" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_costs_time_or_quality_is_a_warning(qwen: Path, tmp_path: Path) -> None:
    columns = {"images": [[picture(2000, 1500)]] * 4, "problem": ["<image>Find x."] * 4, "answer": ["3"] * 4}
    write_parquet(tmp_path / "geometry3k", columns, several=True)
    plan = plan_of(
        *(
            qwen,
            tmp_path / "geometry3k",
            tmp_path,
            "--use_peft",
            "true",
            "--lora_target_modules",
            "gate_proj",
            "up_proj",
        ),
        *("--use_vllm", "true", "--vllm_max_model_length", "512"),
    )
    warnings = "\n".join(plan.warnings)
    assert "the adapter also hits 4 modules of the vision tower" in warnings
    assert "an image takes up to 3834 tokens: --max_pixels 1605632" in warnings
    assert "vLLM reserves memory for the largest image" in warnings
    assert "--vllm_max_model_length 512 is less than the longest prompt" in warnings


def test_memory_and_disk_that_are_not_there(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    """The same plan on a smaller machine."""
    from dataclasses import replace

    from grpo_vlm.arguments import parse
    from grpo_vlm.planning.plan import _size_errors, _warnings

    plan = plan_of(qwen, geometry, tmp_path)
    recipe, training, _ = parse(
        ["--model_name_or_path", str(qwen), "--use_cpu", "true", "--bf16", "false", "--output_dir", "o"]
    )
    small = replace(plan, free_memory=1000.0, free_disk=1000.0)
    errors = _size_errors(small, training)
    assert "weights, gradients, optimizer alone need" in errors[0]
    assert "checkpoints and export need" in errors[1]
    tight = replace(plan, free_memory=plan.memory.needed - 1)
    assert "at its peak this needs about" in _warnings(tight, recipe, training, None, image_tokens=1)[0]


@pytest.mark.parametrize(
    ("flags", "bytes_each"),
    [((), 4), (("--dtype", "auto"), 4), (("--dtype", "bfloat16"), 2), (("--load_in_4bit", "true"), 0.6)],
)
def test_weights_count_as_they_are_loaded(
    qwen: Path, geometry: Path, tmp_path: Path, flags: tuple[str, ...], bytes_each: float
) -> None:
    plan = plan_of(qwen, geometry, tmp_path, *flags)  # its files are in float32
    assert plan.memory.parts["weights"] == plan.size.parameters * bytes_each


def test_what_is_needed_is_a_tenth_above_the_estimate() -> None:
    from grpo_vlm.planning.memory import GIB, Estimate

    assert Estimate(parts={"weights": 10.0 * GIB}).needed == pytest.approx(11.6 * GIB)


def test_fsdp_that_gives_nothing_back_has_all_weights_gathered(
    qwen: Path, geometry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned for two processes, as `accelerate launch` with multi_node.yaml sets the environment."""
    from grpo_vlm.planning.memory import Load, estimate
    from grpo_vlm.planning.sharing import reshards_after_forward

    plan = plan_of(qwen, geometry, tmp_path)
    load = Load(prompt_tokens=8, image_patches=0, completion_tokens=8, training_batch=1, rollout_batch=1)
    moments = [
        estimate(
            *(plan.size, load),
            **{"weight_bytes": 4, "mixed_precision": True, "optimizer": "sgd"},
            **{"sharing": "fsdp", "processes": 2, "reshards": reshards},
        ).moments
        for reshards in (True, False)
    ]
    two_layers = plan.size.embedding_parameters + 2 * plan.size.layer_parameters
    for name in ("training", "rollouts"):
        assert moments[1][name] - moments[0][name] == 2 * (plan.size.parameters - two_layers)

    training: Any = SimpleNamespace(fsdp_config=None)
    assert reshards_after_forward(training)
    assert not reshards_after_forward(SimpleNamespace(fsdp_config={"reshard_after_forward": False}))  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert not reshards_after_forward(training)


def test_vllm_on_the_same_gpu_counts_as_long_as_it_is_awake() -> None:
    from grpo_vlm.planning.memory import Load, ModelSize, estimate

    sizes = dict.fromkeys(("vision_parameters", "layer_parameters", "embedding_parameters"), 0)
    rollouts = RolloutSize(parameters=10, kv_values_per_token=0)
    size = ModelSize(
        parameters=10, trained=10, rollouts=rollouts, hidden_size=1, intermediate_size=1, layers=1, **sizes
    )
    load = Load(
        prompt_tokens=1,
        image_patches=0,
        completion_tokens=1,
        training_batch=1,
        rollout_batch=1,
        rollouts_elsewhere=True,
    )

    def needs(*, sleeps: bool) -> float:
        found = estimate(
            size, load, weight_bytes=4, mixed_precision=False, optimizer="sgd", reserved=1000.0, sleeps=sleeps
        )
        return found.allocated

    assert needs(sleeps=False) == 40 + 40 + 1000 + (2 * 4 + 2 * 50)
    assert needs(sleeps=True) == 40 + 40 + 1000


def test_vllms_part_of_a_gpu_that_is_not_here_is_told_as_a_part(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    """It was counted as nothing."""

    def plan(*flags: str) -> tuple[Any, list[str]]:
        found = plan_of(qwen, geometry, tmp_path, "--dry_run", "true", *flags)
        return found, [line for line in found.lines() if line.startswith("memory")]

    flags = ("--use_vllm", "true", "--vllm_gpu_memory_utilization")
    awake, lines = plan(*flags, "0.4")
    assert lines[-3:] == [
        "memory        0.1 GiB  at the peak, vLLM aside; 0.7 GiB to have",
        f"memory            40%  of the GPU for vLLM all the time, {awake.vllm_bytes / 2**20:.0f} MiB at least",
        "memory        1.2 GiB  the smallest GPU for both (none here to compare with)",
    ]
    assert "memory        0.1 GiB  training" in lines  # alone, and so not called the larger
    _, lines = plan(*flags, "0.4", "--vllm_enable_sleep_mode", "true")
    assert lines[-2].startswith("memory            40%  of the GPU for vLLM while it answers, ")
    assert lines[-1].startswith("memory        1.1 GiB")  # what the training holds then is less
    _, lines = plan(*flags, "0.95")
    assert lines[-1] == ("memory             no  GPU is large enough for both: lower --vllm_gpu_memory_utilization")
    _, lines = plan()
    assert not any("vLLM" in line for line in lines)


def test_vllm_holds_weights_and_an_answer_at_least() -> None:
    from grpo_vlm.planning.memory import GIB, Load, ModelSize
    from grpo_vlm.planning.preflight import vllm_bytes

    sizes = dict.fromkeys(("vision_parameters", "layer_parameters", "embedding_parameters", "trained"), 0)
    sizes |= dict.fromkeys(("hidden_size", "intermediate_size", "layers"), 1)
    rollouts = RolloutSize(parameters=3_754_622_976, kv_values_per_token=18_432)
    size = ModelSize(parameters=3_754_622_976, rollouts=rollouts, **sizes)
    load = Load(prompt_tokens=1024, image_patches=0, completion_tokens=1024, training_batch=8, rollout_batch=32)
    assert vllm_bytes(size, load) == 2 * 3_754_622_976 + 2048 * 36_864
    assert vllm_bytes(size, load, processes=2) / GIB == pytest.approx(3.53, abs=0.01)


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_smallest_gpu_is_one_that_a_plan_on_it_finds_large_enough(sleeps: bool) -> None:
    """The figures of Qwen2.5-VL-3B with LoRA, and with_vllm_colocate.yaml's share."""
    from grpo_vlm.planning.memory import GIB, Estimate

    parts, training, share = {"weights": 7.4 * GIB, "rest": 1.3 * GIB}, 5.4 * GIB, 0.45
    unknown = Estimate(parts=parts, moments={"training": training}, share=share, sleeps=sleeps)
    gpu = unknown.smallest_gpu(7.1 * GIB)
    assert gpu / GIB == pytest.approx(20.1 if sleeps else 31.9, abs=0.1)

    def needed(total: float) -> float:
        moments = {"training": training} | ({"rollouts": share * total} if sleeps else {})
        return Estimate(parts=parts | ({} if sleeps else {"vLLM": share * total}), moments=moments).needed

    assert needed(gpu) == pytest.approx(gpu)
    assert needed(0.99 * gpu) > 0.99 * gpu
    assert unknown.smallest_gpu(18 * GIB) == pytest.approx(40 * GIB)  # its weights must fit into its share
    assert Estimate(parts=parts, share=0.95).smallest_gpu(GIB) == float("inf")
    assert Estimate(parts=parts).smallest_gpu(GIB) == Estimate(parts=parts).needed


def test_a_part_of_the_gpu_without_room_for_vllms_weights_is_a_warning(
    qwen: Path, geometry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_vlm.planning import plan

    flags = ("--use_vllm", "true", "--vllm_gpu_memory_utilization")
    needed = plan_of(qwen, geometry, tmp_path, *flags, "0.5").vllm_bytes
    gpu = 3 * needed  # one that is not here
    monkeypatch.setattr(plan, "gpu_memory", lambda: (gpu, gpu))
    said = "of this GPU, but vLLM's weights and the cache of one answer need"
    assert any(said in text for text in plan_of(qwen, geometry, tmp_path, *flags, "0.3").warnings)
    assert not any(said in text for text in plan_of(qwen, geometry, tmp_path, *flags, "0.4").warnings)


def size_of_3b(**different: Any) -> Any:
    from grpo_vlm.planning.memory import ModelSize

    counts = {
        "parameters": 3_754_622_976,
        "vision_parameters": 668_683_264,
        "trained": 3_754_622_976,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layers": 36,
        "layer_parameters": 77_077_000,
        "embedding_parameters": 311_164_928,
        "rollouts": RolloutSize(
            parameters=3_754_622_976,
            folded=36 * 77_070_336 if "adapted_modules" in different else 0,
            kv_values_per_token=18_432,
        ),
    }
    return ModelSize(**(counts | different))


def test_fast_rollouts_keep_a_copy_a_cache_and_graphs() -> None:
    """At the shape and load of docs/benchmarks/training.md, where a full fine-tune took 11.5 GiB more with them."""
    from grpo_vlm.planning.memory import GIB, Load, estimate

    load = Load(
        prompt_tokens=1040,
        image_patches=1936,
        completion_tokens=128,
        training_batch=8,
        rollout_batch=64,
        rollout_prompts=8,
    )
    options: dict[str, Any] = {"mixed_precision": True, "optimizer": "adamw_torch_fused"}
    full = estimate(size_of_3b(), load, weight_bytes=4, fast_rollouts=True, **options)
    plain = estimate(size_of_3b(), load, weight_bytes=4, **options)
    # Weights in bfloat16, 64 caches of 1,536 tokens, graphs.
    assert full.parts["fast rollouts"] / GIB == pytest.approx(7.0 + 3.4 + 0.9, abs=0.1)
    assert full.allocated <= plain.allocated + full.parts["fast rollouts"]
    adapter = size_of_3b(trained=119_734_272, adapted_modules=252)
    lora = estimate(adapter, load, weight_bytes=2, fast_rollouts=True, **options)
    assert lora.parts["fast rollouts"] / GIB == pytest.approx(5.2 + 3.4 + 0.9, abs=0.1)
    # One prefill a prompt, from weights without an adapter.
    assert lora.moments["rollouts"] < estimate(adapter, load, weight_bytes=2, **options).moments["rollouts"] / 3


def test_each_process_holds_what_it_gathers_for_rollouts() -> None:
    """Sharded weights are whole in the copy, whatever they are in; under ZeRO-2 each process has them already."""
    from grpo_vlm.planning.memory import GIB, Load, estimate

    load = Load(prompt_tokens=1040, image_patches=0, completion_tokens=128, training_batch=8, rollout_batch=64)

    def kept(sharing: str, *, mixed_precision: bool = True, weight_bytes: float = 4, **adapter: Any) -> float:
        found = estimate(
            size_of_3b(**adapter), load, weight_bytes=weight_bytes, mixed_precision=mixed_precision,
            optimizer="adamw_torch_fused", sharing=sharing, processes=8, fast_rollouts=True,
        )  # fmt: skip
        return found.parts["fast rollouts"] / GIB

    cache_and_graphs = 3.375 + 0.931
    assert kept("fsdp") == pytest.approx(6.99 + cache_and_graphs, abs=0.05)
    assert kept("fsdp", weight_bytes=2, trained=119_734_272, adapted_modules=252) == kept("fsdp")
    assert kept("zero3") == kept("fsdp")  # its float32 shards are the optimizer's; what is gathered is in bfloat16
    assert kept("fsdp", mixed_precision=False) == pytest.approx(13.99 + 2 * 3.375 + 0.931, abs=0.05)
    assert kept("zero2") == pytest.approx(cache_and_graphs, abs=0.05)
    assert kept("ddp") == kept("fsdp")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FSDP_VERSION": "2"}, "the fast way, if the GPU has room, the weights gathered on each process once a step"),
        ({}, "the plain way: the first FSDP keeps the weights"),
        (
            {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "the plain way: the weights lie on the CPU between two steps",
        ),
    ],
)
def test_rollouts_of_sharded_weights_are_planned(
    environment: dict[str, str],
    said: str,
    qwen: Path,
    geometry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from grpo_vlm.planning import plan

    monkeypatch.setattr(plan, "find_sharing", lambda training: "fsdp")
    monkeypatch.setattr("grpo_vlm.planning.sharing.find_sharing", lambda training: "fsdp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flags = ("--per_device_train_batch_size", "4", "--num_generations", "4", "--dry_run", "true")
    found = plan_of(qwen, geometry, tmp_path, *flags)
    assert f"rollouts    {said}" in found.lines()
    assert ("fast rollouts" in found.memory.parts) == ("the fast way" in said)


def test_rollouts_are_planned_the_fast_way_where_there_is_room(
    qwen: Path, geometry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_vlm.planning import plan

    flags = ("--per_device_train_batch_size", "4", "--num_generations", "4", "--dry_run", "true")
    dry = plan_of(qwen, geometry, tmp_path, *flags)
    assert dry.rollouts_plain is None
    assert "rollouts    the fast way, if the GPU has room" in dry.lines()
    assert any("fast rollouts" in line for line in dry.lines() if line.startswith("memory"))
    for off, reason in (
        (("--fast_rollouts", "false"), "--fast_rollouts false"),
        (("--use_vllm", "true"), "vLLM makes them"),
        (("--load_in_4bit", "true"), "the base is quantised"),
    ):
        other = plan_of(qwen, geometry, tmp_path, *flags, *off)
        assert (other.rollouts_plain, "fast rollouts" in other.memory.parts) == (reason, False)
        assert f"rollouts    the plain way: {reason}" in other.lines()
    on_a_cpu = plan_of(qwen, geometry, tmp_path, *flags[:-2])
    assert on_a_cpu.rollouts_plain == "decode steps are compiled for CUDA alone"
    # A GPU with room for the training alone.
    kept = dry.memory.parts["fast rollouts"]
    monkeypatch.setattr(plan, "gpu_memory", lambda: (dry.memory.needed, dry.memory.needed - kept / 2))
    tight = plan_of(qwen, geometry, tmp_path, *flags)
    no_room = "GPU memory has no room for a copy of the weights and a static cache"
    assert tight.rollouts_plain == no_room
    assert "fast rollouts" not in tight.memory.parts
    assert [text for text in tight.warnings if "plain way" in text] == [f"rollouts go the plain way: {no_room}"]
    monkeypatch.setattr("grpo_toolkit.model.rollouts.supported.OLDEST", "99.0")
    older = plan_of(qwen, geometry, tmp_path, *flags)
    assert (older.rollouts_plain or "").endswith("is older than 99.0")


def test_sharing_divides_what_stays() -> None:
    from grpo_vlm.planning.memory import GIB, Load, estimate

    size = size_of_3b()
    load = Load(prompt_tokens=512, image_patches=0, completion_tokens=512, training_batch=8, rollout_batch=8)

    def standing(sharing: Any, processes: int) -> list[float]:
        found = estimate(
            size,
            load,
            weight_bytes=4,
            mixed_precision=True,
            optimizer="adamw_torch_fused",
            sharing=sharing,
            processes=processes,
        )
        return [round(part / GIB, 1) for part in found.parts.values()]

    assert standing("none", 1) == [14.0, 14.0, 28.0]
    assert standing("ddp", 2) == [14.0, 28.0, 28.0]  # DDP's buckets are a second copy of the gradients
    assert standing("fsdp", 2) == [7.0, 7.0, 14.0]
    assert standing("zero2", 2) == [7.0, 7.0, 21.0]  # bfloat16 weights, float32 masters beside Adam's moments
    assert standing("zero3", 4) == [1.7, 3.5, 10.5]
