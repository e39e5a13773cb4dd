from __future__ import annotations

from grpo_toolkit.checkpoint.name_lists import summarised


def test_numbered_names_are_one_pattern() -> None:
    names = [f"model.layers.{n}.mlp.{part}.weight" for n in range(36) for part in ("up_proj", "down_proj")]
    assert (
        summarised(names)
        == "model.layers.{0, ..., 35}.mlp.up_proj.weight, model.layers.{0, ..., 35}.mlp.down_proj.weight"
    )
    assert summarised(["a.0.b", "a.1.b", "lm_head.weight"]) == "a.{0, 1}.b, lm_head.weight"
    assert summarised(["a.7.b"]) == "a.7.b"
    assert summarised([]) == ""


def test_what_is_not_shown_is_counted() -> None:
    names = [f"{letter}.{n}.w" for letter in "abcdef" for n in range(3)]
    assert summarised(names, most=2) == "a.{0, 1, 2}.w, b.{0, 1, 2}.w and 12 more"
