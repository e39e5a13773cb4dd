"""Merges, held against PEFT's own on real adapters; what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.cli import main
from grpo_toolkit.errors import (
    CheckpointError,
    GrpoToolkitError,
    InputError,
    OutputExistsError,
    UnsupportedError,
    VerificationError,
)
from grpo_toolkit.merge.merge import merge_adapter
from grpo_toolkit.model.load import auto_class, dtype_argument
from tests.support.models import MERGE_BUILDERS
from tests.support.training import v5_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LANGUAGE = r".*layers.*\.(q_proj|down_proj)"

# What PEFT can do to a model, by name: the base, and the options of its adapter.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen", {"target_modules": SEVEN}),
    "rslora": ("qwen", {"target_modules": LANGUAGE, "use_rslora": True, "lora_alpha": 3}),
    "dora": ("qwen", {"target_modules": SEVEN, "use_dora": True}),
    "patterns": (
        "qwen",
        {
            "target_modules": SEVEN,
            "rank_pattern": {"q_proj": 2, r"language_model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 32, "down_proj": 1},
        },
    ),
    "layers": ("qwen", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "gaussian": ("qwen", {"target_modules": LANGUAGE, "init_lora_weights": "gaussian"}),
    "convolution": ("qwen", {"target_modules": r".*patch_embed\.proj"}),
    "dora on a convolution": ("qwen", {"target_modules": r".*patch_embed\.proj", "use_dora": True}),
    "modules to save": ("qwen", {"target_modules": LANGUAGE, "modules_to_save": ["mlp.2"]}),
    "biases": ("qwen", {"target_modules": SEVEN, "bias": "all"}),
    "biases of adapted layers": ("qwen", {"target_modules": ["q_proj", "qkv"], "bias": "lora_only"}),
    "lora_bias": ("qwen", {"target_modules": ["q_proj", "qkv"], "lora_bias": True}),
    "untied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "untied head to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora on embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora on conv1d": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "conv1d, square": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "llava": ("llava", {"target_modules": [*SEVEN, "out_proj", "fc1", "linear_2"]}),
}
EXPERTS = {
    "experts": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "one parameter of the experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
    "experts of mixtral": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
        },
    ),
}
# PEFT 0.15 adds a factor's bias without its scale, and takes the lengths of rows for DoRA on embeddings: its merged
# model is not its live one (logits 1.9 and 0.2 apart on the tiny models).
MERGED_WRONGLY_BY_OLD_PEFT = ("lora_bias", "dora on embeddings")


@pytest.fixture(scope="module")
def bases(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny bases by family, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("bases"), {"qwen": qwen}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = MERGE_BUILDERS[name](folder / name)
        return made[name]

    return base


def load_float32(base: Path) -> Any:
    return auto_class(base).from_pretrained(base, **{dtype_argument(): torch.float32})


def in_dtype(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a base with its weights in another dtype."""
    shutil.copytree(base, folder)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_adapter(base: Path, folder: Path, name: str = "default", **options: Any) -> Path:
    """A PEFT adapter of a base, every tensor of it moved off its start, as training would."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "init_lora_weights": False, **options}
    torch.manual_seed(3)
    model = get_peft_model(load_float32(base), LoraConfig(**options), adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder if name == "default" else folder / name


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The oracle: the whole model in float32, merged and saved by PEFT and transformers."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_float32(base), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return stored(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in open_checkpoint(folder).weight_files() for n, t in load_file(file).items()}


def assert_one_rounding_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.dtype == torch.float32:  # two orders of summation
            torch.testing.assert_close(
                tensor, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n} {text}"
            )
            continue
        expected = theirs[name].to(tensor.dtype)
        apart = (tensor.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        tiny = (tensor.float() - expected.float()).abs() < 1e-6  # around zero, where signs differ
        assert ((apart <= 1) | tiny).all(), name


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=v5_only) for name in EXPERTS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_merge_is_pefts_merge(
    variant: str, dtype: torch.dtype, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    family, options = {**VARIANTS, **EXPERTS}[variant]
    if variant in MERGED_WRONGLY_BY_OLD_PEFT and Version(peft.__version__) < Version("0.17"):
        pytest.skip("this PEFT merges something else than it trains; the next test holds for all of them")
    base = bases(family)
    if dtype is not torch.float32:
        base = in_dtype(base, tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    # Under the base's own names, so that they compare; test_dialect.py has the published ones.
    result = merge_adapter(adapter, tmp_path / "merged", base=base, compat="v5")
    ours = stored(tmp_path / "merged")
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert_one_rounding_apart(ours, merged_by_peft(base, adapter, tmp_path / "peft"))
    before = stored(base)
    assert {name for name in ours if not ours[name].equal(before[name])} == set(result.changed)
    assert result.unchanged == ()
    assert result.copied == len(before) - len(result.changed)
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("variant", ["lora", "dora", *MERGED_WRONGLY_BY_OLD_PEFT])
def test_a_merged_model_says_what_the_adapted_one_says(
    variant: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    family, options = VARIANTS[variant]
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(adapter, tmp_path / "merged")
    tokens = torch.tensor([[1, 5, 9, 30, 12]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_float32(base), adapter).eval()(input_ids=tokens).logits
        merged = load_float32(tmp_path / "merged").eval()(input_ids=tokens).logits
        plain = load_float32(base).eval()(input_ids=tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (plain - adapted).abs().max() > 0.1


def rename(folder: Path, file: str, change: Callable[[str], str]) -> None:
    weights = {change(name): tensor for name, tensor in load_file(folder / file).items()}
    save_file(weights, folder / file, metadata={"format": "pt"})


PUBLISHED = [("model.language_model.", "model."), ("model.visual.", "visual.")]
SPELLINGS = {
    "4.49": PUBLISHED,
    "published": PUBLISHED,
    "4.52 and later": [],
    "servers": [("model.language_model.", "language_model.model."), ("model.visual.", "visual.")],
    "inner model": [("model.language_model.", "language_model."), ("model.visual.", "visual.")],
}


def live_spelling(name: str) -> str:
    name = name.replace("base_model.model.", "", 1)
    if name.startswith("visual."):
        name = f"model.{name}"
    elif name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        name = name.replace("model.", "model.language_model.", 1)
    return f"base_model.model.{name}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_finds_its_modules(spelling: str, qwen: Path, tmp_path: Path) -> None:
    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=[*SEVEN, "qkv"])
    merge_adapter(adapter, tmp_path / "expected")

    def respelled(name: str) -> str:
        name = live_spelling(name)
        for live, other in SPELLINGS[spelling]:
            name = name.replace(f"base_model.model.{live}", f"base_model.model.{other}")
        return name

    rename(adapter, "adapter_model.safetensors", respelled)
    result = merge_adapter(adapter, tmp_path / "merged")
    assert any("visual" in name for name in result.changed)
    assert any("q_proj" in name for name in result.changed)
    expected, found = stored(tmp_path / "expected"), stored(tmp_path / "merged")
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_base_may_be_stored_in_any_spelling(spelling: str, qwen: Path, tmp_path: Path) -> None:
    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=[*SEVEN, "qkv"])
    merge_adapter(adapter, tmp_path / "expected")
    base = tmp_path / "base"
    shutil.copytree(qwen, base)

    def respelled(name: str) -> str:
        name = live_spelling(f"base_model.model.{name}").removeprefix("base_model.model.")
        for live, other in SPELLINGS[spelling]:
            name = other + name.removeprefix(live) if name.startswith(live) else name
        return name

    rename(base, "model.safetensors", respelled)
    merge_adapter(adapter, tmp_path / "merged", base=base, compat="v5")
    expected, found = stored(tmp_path / "expected"), stored(tmp_path / "merged")
    assert found.keys() == {respelled(name) for name in expected}
    assert all(found[respelled(name)].equal(expected[name]) for name in expected)


def test_a_sharded_base_keeps_its_shards_and_may_get_others(qwen: Path, tmp_path: Path) -> None:
    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=SEVEN)
    merge_adapter(adapter, tmp_path / "one")
    weights, size = stored(tmp_path / "one"), 60_000
    merge_adapter(adapter, tmp_path / "sharded", max_shard_size=size)
    files = open_checkpoint(tmp_path / "sharded").weight_files()
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= size or len(load_file(file)) == 1 for file in files)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in weights.values())}
    assert index["weight_map"].keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in stored(tmp_path / "sharded").items())
    base = tmp_path / "sharded base"
    shutil.copytree(tmp_path / "sharded", base)
    merge_adapter(adapter, tmp_path / "again", base=base)
    assert [file.name for file in open_checkpoint(tmp_path / "again").weight_files()] == [file.name for file in files]
    merge_adapter(adapter, tmp_path / "whole", base=base, max_shard_size="1GB")
    assert [file.name for file in open_checkpoint(tmp_path / "whole").weight_files()] == ["model.safetensors"]
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert all(tensor.equal(stored(tmp_path / "again")[name]) for name, tensor in stored(tmp_path / "whole").items())


def test_of_several_adapters_one_is_named(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "init_lora_weights": False}
    model = get_peft_model(load_float32(qwen), LoraConfig(target_modules=["q_proj"], **options), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["v_proj"], **options))
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(InputError, match=r"holds 2 adapters \(one, two\); name one"):
        merge_adapter(tmp_path / "adapters", tmp_path / "merged")
    with pytest.raises(InputError, match="no adapter 'three' in it; there is one, two"):
        merge_adapter(tmp_path / "adapters", tmp_path / "merged", adapter_name="three")
    result = merge_adapter(tmp_path / "adapters", tmp_path / "merged", adapter_name="two")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in result.changed} == {"v_proj"}


REFUSED_OPTIONS: dict[str, Any] = {
    "peft_type": "VERA",
    "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [3],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "velora_config": {"num_groups": 64},
    "megatron_config": {"hidden_size": 8},
    "an_option_of_the_future": "on",
}


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_what_is_not_merged_is_refused_by_name(option: str, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, {option: REFUSED_OPTIONS[option]})
    with pytest.raises(UnsupportedError, match=option):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_every_option_of_the_installed_peft_is_decided() -> None:
    from peft import LoraConfig

    from grpo_toolkit.merge import adapter

    undecided = LoraConfig().to_dict().keys() - adapter._COMPUTED - adapter._HARMLESS - adapter._REFUSED.keys()
    assert undecided == set()


WRONG_TYPES: dict[str, Any] = {
    "r": "four",
    "lora_alpha": None,
    "rank_pattern": [4],
    "alpha_pattern": {"q_proj": "much"},
    "target_modules": {"q_proj": 1},
    "modules_to_save": [1],
    "layers_to_transform": "all",
    "exclude_modules": "(",
}


@pytest.mark.parametrize("option", WRONG_TYPES)
def test_an_option_of_the_wrong_kind_is_named(option: str, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, {option: WRONG_TYPES[option]})
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: .*({option}|no regular expression)"):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def edit_config(adapter: Path, changes: dict[str, Any]) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    file = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    weights = {name: changed for name, t in load_file(file).items() if (changed := change(name, t)) is not None}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(qwen, tmp_path_factory.mktemp("adapters") / "adapter", target_modules=["q_proj", "up_proj"])


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Qwen2.5-VL that a test may damage."""
    shutil.copytree(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


DAMAGES: dict[str, tuple[Callable[[str, torch.Tensor], torch.Tensor | None], type[Exception], str]] = {
    "a factor is missing": (
        lambda name, t: None if name.endswith("layers.1.self_attn.q_proj.lora_B.weight") else t,
        CheckpointError,
        r"layers.1.self_attn.q_proj has lora_A, expected both factors",
    ),
    "a layer is missing": (
        lambda name, t: None if "layers.1.self_attn.q_proj" in name else t,
        CheckpointError,
        r"no factors for 1 modules that its config targets: model.language_model.layers.1.self_attn.q_proj; it is not",
    ),
    "another rank": (
        lambda name, t: (t[:2] if "lora_A" in name else t[:, :2]).contiguous(),
        CheckpointError,
        r"has rank 2, but by its config it should be 4",
    ),
    "not gathered": (
        lambda name, t: t[:0] if "lora_A" in name else t[:, :0].contiguous(),
        CheckpointError,
        r"layers.0.\S+ is empty: it was saved while sharded",
    ),
    "another width": (
        lambda name, t: t[:, :16].contiguous() if "q_proj.lora_A" in name else t,
        CheckpointError,
        r"factors of \(4, 16\) and \(32, 4\) do not fit model.layers.0.self_attn.q_proj.weight of \(32, 32\)",
    ),
    "a value that is not finite": (
        lambda name, t: (
            t.index_fill(0, torch.tensor([1]), float("nan")) if "layers.1.mlp.up_proj.lora_B" in name else t
        ),
        VerificationError,
        r"not published: model.layers.1.mlp.up_proj.weight has values that are not finite",
    ),
    "a module that learnt nothing": (
        lambda name, t: t * 0 if "layers.1.mlp.up_proj.lora_B" in name else t,
        VerificationError,
        r"1 of the \d+ tensors that .* adapts came out as the base has them \(model.layers.1.mlp.up_proj.weight\)",
    ),
    "changes below the dtype": (
        lambda name, t: t * 1e-12 if "lora_B" in name else t,
        VerificationError,
        r"smaller than their dtype can say",
    ),
    "untrained": (
        lambda name, t: t * 0 if "lora_B" in name else t,
        VerificationError,
        r"untrained: a factor of each of its \d+ pairs is zero, so the merge would be the base",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_merge_that_would_not_be_what_was_trained_fails(damage: str, adapter: Path, tmp_path: Path) -> None:
    change, error, message = DAMAGES[damage]
    edit_weights(adapter, change)
    with pytest.raises(error, match=message):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_an_adapter_that_changes_nothing_is_merged_when_that_is_meant(
    adapter: Path, qwen: Path, tmp_path: Path
) -> None:
    edit_weights(adapter, lambda name, t: t * 0 if "lora_B" in name else t)
    result = merge_adapter(adapter, tmp_path / "merged", allow_unchanged=True)
    assert result.changed == ()
    assert len(result.unchanged) == 6
    assert (tmp_path / "merged" / "model.safetensors").read_bytes()[-100:] == (
        qwen / "model.safetensors"
    ).read_bytes()[-100:]
    assert all(tensor.equal(stored(qwen)[name]) for name, tensor in stored(tmp_path / "merged").items())


@v5_only
def test_experts_of_a_layer_that_are_missing_are_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, options = EXPERTS["experts of mixtral"]
    adapter = make_adapter(bases(family), tmp_path / "adapter", **options)
    edit_weights(adapter, lambda name, t: None if "layers.1.mlp.experts.lora" in name else t)
    with pytest.raises(CheckpointError, match=r"for 1 modules .*: model.layers.1.mlp.experts; it is not whole"):
        merge_adapter(adapter, tmp_path / "merged")


@v5_only
def test_a_head_that_was_not_kept_tied_is_not_dropped(qwen: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(qwen, tmp_path / "adapter", **options)
    edit_weights(adapter, lambda name, t: t + 1 if "lm_head" in name else t)
    with pytest.raises(CheckpointError, match=r"1 of its modules are not in .*: lm_head.weight"):
        merge_adapter(adapter, tmp_path / "merged")


def test_names_that_fit_nowhere_are_listed(adapter: Path, tmp_path: Path) -> None:
    rename(adapter, "adapter_model.safetensors", lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(CheckpointError, match=r"2 of its modules are not in .*attention.q_proj.*names like") as caught:
        merge_adapter(adapter, tmp_path / "merged")
    assert "--base" in str(caught.value)


def test_tensors_that_are_no_loras_are_refused(adapter: Path, tmp_path: Path) -> None:
    rename(adapter, "adapter_model.safetensors", lambda name: name.replace("lora_A.weight", "lora_A.policy.weight"))
    with pytest.raises(CheckpointError, match="tensors have no place in a LoRA adapter"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_a_merge_that_would_untie_embeddings_is_refused(options: dict[str, Any], qwen: Path, tmp_path: Path) -> None:
    adapter = make_adapter(qwen, tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedError, match=r"changes model.embed_tokens.weight, which the base ties"):
        merge_adapter(adapter, tmp_path / "merged")


@v5_only
def test_embeddings_that_were_kept_tied_stay_tied(qwen: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(qwen, tmp_path / "adapter", **options)
    result = merge_adapter(adapter, tmp_path / "merged")
    assert "model.embed_tokens.weight" in result.changed
    assert_one_rounding_apart(stored(tmp_path / "merged"), merged_by_peft(qwen, adapter, tmp_path / "peft"))


def test_a_resized_vocabulary_asks_for_the_resized_base(qwen: Path, tmp_path: Path) -> None:
    adapter = make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    edit_weights(adapter, lambda name, t: torch.cat([t, t[:8]]) if "embed_tokens" in name else t)
    with pytest.raises(CheckpointError, match="the vocabulary was resized: save the resized base"):
        merge_adapter(adapter, tmp_path / "merged")


BAD_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "quantised": (
        lambda base: edit_json(base / "config.json", {"quantization_config": {"bits": 4}}),
        "quantization_config",
    ),
    "cut off": (lambda base: cut(base / "model.safetensors", 100), "it is cut off"),
    "an adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "is an adapter itself"),
    "pickled": (lambda base: (base / "model.safetensors").unlink(), "only safetensors are read"),
    "integers": (
        lambda base: edit_weights(base, lambda name, t: t.to(torch.int8) if "layers.0.mlp.up_proj" in name else t),
        "model.layers.0.mlp.up_proj.weight is I8, which is not merged into",
    ),
    "two spellings": (
        lambda base: edit_both(base / "model.safetensors", "model.norm.weight", "model.language_model.norm.weight"),
        "two spellings of one tensor",
    ),
}


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_both(path: Path, name: str, other: str) -> None:
    weights = load_file(path)
    save_file({**weights, other: weights[name].clone()}, path, metadata={"format": "pt"})


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("fault", BAD_BASES)
def test_a_base_that_cannot_be_merged_into_is_refused(fault: str, adapter: Path, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "base")
    damage, message = BAD_BASES[fault]
    damage(tmp_path / "base")
    with pytest.raises(GrpoToolkitError, match=message):
        merge_adapter(adapter, tmp_path / "out" / "merged", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_poisoned_base_gives_a_clean_merge(adapter: Path, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, tmp_path / "base")
    edit_json(tmp_path / "base" / "generation_config.json", {"use_cache": False})
    merge_adapter(adapter, tmp_path / "merged", base=tmp_path / "base")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["use_cache"] is True
    assert (tmp_path / "merged" / "config.json").read_bytes() == (qwen / "config.json").read_bytes()


def test_a_merge_replaces_an_earlier_one_only_when_told(adapter: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "grpo_toolkit.json").read_text())
    assert manifest["changed_tensors"] == 6
    assert manifest["files"].keys() == {p.name for p in (tmp_path / "merged").iterdir()} - {"grpo_toolkit.json"}
    with pytest.raises(OutputExistsError, match="overwrite"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", overwrite=True)


def test_a_form_that_is_none_is_wrong_use(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="v4"):
        merge_adapter(adapter, tmp_path / "merged", compat="v4")
    assert not (tmp_path / "merged").exists()


def test_the_command_says_where_and_what(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["changed"], said["unchanged"]) == (str(tmp_path / "merged"), 6, [])
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--overwrite", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{tmp_path / 'merged'}\n", "")
    edit_weights(adapter, lambda name, t: t * 0 if "lora_B" in name else t)
    assert main(["merge", str(adapter), str(tmp_path / "other")]) == 1
    assert "untrained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", "{tmp}/out"], "nowhere: not a folder"),
        (["{qwen}", "{tmp}/out"], "no adapter_config.json in it or in a folder of it"),
        (["{tmp}/adapter", "{tmp}/out", "--base", "no/base"], "base no/base: neither a model folder"),
        (["{tmp}/adapter", "{tmp}/adapter"], "not an export of ours"),
        (["{tmp}/nowhere", "{tmp}/adapter"], "not an export of ours"),  # what would be replaced is looked at first
        (["{tmp}/adapter", "{tmp}/out", "--max-shard-size", "x"], "not a size such as 5GB"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, adapter: Path, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", *(argument.format(tmp=tmp_path, qwen=qwen) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
