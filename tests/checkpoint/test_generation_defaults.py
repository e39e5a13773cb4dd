"""Inference defaults as pure functions: literal JSON in, exact JSON out."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_toolkit.checkpoint.generation_defaults import capture_defaults, with_cache_defaults
from grpo_toolkit.checkpoint.json_files import ABSENT

# As Qwen publishes Qwen2.5-VL-3B-Instruct: do_sample and the rest, no use_cache.
GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 1e-06,
}


@pytest.mark.parametrize(
    ("base", "trained", "restored"),
    [
        # The published flat form has the key at the top; the trainer put false there.
        ({"use_cache": True, "x": 1}, {"use_cache": False, "x": 2}, {"use_cache": True, "x": 2}),
        # Nested, as transformers 5 holds it: the trainer *added* a key at the top. Restoring means deleting it.
        (
            {"text_config": {"use_cache": True}},
            {"use_cache": False, "text_config": {"use_cache": False}},
            {"text_config": {"use_cache": True}},
        ),
        # A poisoned base: false and null both end as true.
        ({"use_cache": False, "text_config": {"use_cache": None}}, {}, {"use_cache": True}),
        # Nowhere in the base: nowhere in the export, whatever training did.
        ({"text_config": {}}, {"use_cache": None, "text_config": {"use_cache": True}}, {"text_config": {}}),
        # Lost in training: put back.
        ({"use_cache": True}, {"x": 1}, {"x": 1, "use_cache": True}),
    ],
)
def test_use_cache_ends_as_the_base_had_it(
    base: dict[str, Any], trained: dict[str, Any], restored: dict[str, Any]
) -> None:
    assert with_cache_defaults(trained, capture_defaults(base, ABSENT)) == restored


def test_key_order_is_kept() -> None:
    defaults = capture_defaults({"use_cache": True}, ABSENT)
    assert list(with_cache_defaults({"b": 1, "use_cache": False, "a": 2}, defaults)) == ["b", "use_cache", "a"]


def test_a_clean_base_needs_no_repair() -> None:
    defaults = capture_defaults({"text_config": {"use_cache": True}}, GENERATION)
    assert defaults.repairs == ()
    assert defaults.generation == GENERATION
    assert defaults.cache_levels == {("text_config",)}


@pytest.mark.parametrize("value", [False, None])
def test_a_poisoned_generation_config_is_put_right_and_said(value: object) -> None:
    defaults = capture_defaults({}, {**GENERATION, "use_cache": value})
    assert defaults.generation == {**GENERATION, "use_cache": True}
    shown = "false" if value is False else "null"
    assert [str(repair) for repair in defaults.repairs] == [f"generation_config.json: use_cache was {shown}, now true"]


def test_poison_in_a_nested_config_is_named_with_its_key() -> None:
    defaults = capture_defaults({"text_config": {"use_cache": False}}, ABSENT)
    assert [str(repair) for repair in defaults.repairs] == ["config.json: text_config.use_cache was false, now true"]


def test_overrides_win_and_leave_the_input_alone() -> None:
    generation = dict(GENERATION)
    defaults = capture_defaults({}, generation, overrides={"temperature": 0.7})
    assert defaults.generation == {**GENERATION, "temperature": 0.7}
    assert generation == GENERATION
    assert capture_defaults({}, ABSENT, overrides={"top_k": 5}).generation == {"top_k": 5}
