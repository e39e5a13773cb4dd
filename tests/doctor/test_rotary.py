"""Rotary settings in the form of transformers 5, held against 4.x: it answers otherwise, and no word is said."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from grpo_toolkit import diagnose_checkpoint, repair_checkpoint
from grpo_toolkit.checkpoint.model_families import (
    LOCAL_THETA_OF_V4,
    PARTIAL_ROTARY_OF_V4,
    ROTARY_NAMES_OF_V4,
    THETAS_OF_V4,
    older_rotary,
)
from scripts.models.base_variants import build_text_base, change_json

if TYPE_CHECKING:
    from pathlib import Path

VERSION = Version(transformers.__version__)
pytestmark = pytest.mark.stack
only_v4 = pytest.mark.skipif(Version("5") <= VERSION, reason="transformers 5 reads its own form")

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_theta": 5e5},
    "Qwen2": {"rope_theta": 5e5, "rope_scaling": YARN},
    "Qwen2Moe": {"rope_theta": 5e5},
    "Qwen3Moe": {"rope_theta": 1e6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Olmo2": {"rope_theta": 5e5},
    "Granite": {"rope_theta": 5e5},
    "Glm": {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "pad_token_id": 0},
    "Glm4": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "StableLm": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "Gemma3Text": {"rope_theta": 5e5, "rope_local_base_freq": 3e4, "sliding_window": 4},
    "Phi3": {"rope_theta": 5e5, "pad_token_id": 0},
    "Starcoder2": {"rope_theta": 5e5},
    "GPTNeoX": {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
}


def as_transformers_5_writes_it(config: dict[str, Any]) -> None:
    names = {new: old for old, new in ROTARY_NAMES_OF_V4.get(config["model_type"], {}).items()}
    taken = {names.get(key, key): config.pop(key) for key in list(config) if key in (*names, *KEYS)}
    whole = {"rope_type": "default", **(taken.pop("rope_scaling", None) or {}), **taken}
    local = whole.pop("rope_local_base_freq", None)
    layers = {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    config["rope_parameters"] = whole if local is None else layers


KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 29)[None]).logits
    return found


@only_v4
@pytest.mark.parametrize("family", FAMILIES)
def test_a_theta_that_4x_passes_over_is_found_and_put_where_it_looks(family: str, tmp_path: Path) -> None:
    folder = build_text_base(family, tmp_path, **FAMILIES[family])
    wanted = logits(folder)
    change_json(folder, "config.json", as_transformers_5_writes_it)
    assert not logits(folder).equal(wanted)  # the fault: no error, and other answers
    codes = {found.code for found in diagnose_checkpoint(folder, reader="transformers==4.57").judged}
    assert "rope-parameters-alone" in codes
    repair_checkpoint(folder)
    assert logits(folder).equal(wanted)
    assert "rope-parameters-alone" not in {found.code for found in diagnose_checkpoint(folder).findings}


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("qwen3_moe", {"rope_theta": 10_000.0, "rope_type": "default"}),  # what 4.x takes anyway
        ("glm4", {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        ),
        ("qwen3_5_text", {"rope_theta": 1e7, "rope_type": "default"}),  # which 4.x does not know
        ("olmo3", {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),  # nor such two
        ("llama", {"rope_theta": "many"}),
    ],
)
def test_what_4x_reads_the_same_or_not_at_all_is_no_finding(
    model_type: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "rope_parameters": rope}))
    assert "rope-parameters-alone" not in {found.code for found in diagnose_checkpoint(tmp_path).findings}


def test_phi3_gets_the_three_keys_that_its_class_takes() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0],
        "long_factor": [2.0],
        "factor": 2.0,
        "partial_rotary_factor": 1.0,
    }
    assert older_rotary(rope, "phi3") == {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        "rope_theta": 1e4,
    }


@pytest.mark.skipif(VERSION.release[:2] != (4, 57), reason="the table is of the last 4.x")
def test_the_defaults_are_those_of_the_classes() -> None:
    theta, local, part = {}, {}, {}
    for kind in config_classes():
        names = ROTARY_NAMES_OF_V4.get(kind.model_type, {})
        defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
        theta[kind.model_type] = defaults.get(names.get("rope_theta", "rope_theta"))
        local[kind.model_type] = defaults.get("rope_local_base_freq")
        part[kind.model_type] = defaults.get(names.get("partial_rotary_factor", "partial_rotary_factor")) or 1.0
    assert {name: theta[name] for name in THETAS_OF_V4} == THETAS_OF_V4
    assert {name: local[name] for name in LOCAL_THETA_OF_V4} == LOCAL_THETA_OF_V4
    assert {name: part[name] for name in THETAS_OF_V4} == {
        name: PARTIAL_ROTARY_OF_V4.get(name, 1.0) for name in THETAS_OF_V4
    }


def config_classes() -> list[Any]:
    """Return the config classes of the library, those of parts of a model included."""
    found, todo = [], [transformers.PretrainedConfig]
    for name in transformers.CONFIG_MAPPING:
        transformers.CONFIG_MAPPING[name]  # imports it
    while todo:
        for kind in todo.pop().__subclasses__():
            todo.append(kind)
            if kind.__module__.startswith("transformers."):
                found.append(kind)
    return found
