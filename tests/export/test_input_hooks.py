"""A trainer's hook on the model's inputs: its live model answers otherwise than its saves, and the log says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.errors import VerificationError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.policy_answers import input_hooks
from grpo_toolkit.model.load import load_model
from scripts.models.tiny_bases import build_llama

if TYPE_CHECKING:
    from pathlib import Path

SAID = "test_input_hooks.reverse_ids changes what goes into the live model"


def reverse_ids(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(-1)}


def test_a_refusal_for_a_hook_on_the_inputs_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = build_llama(tmp_path / "base")
    model, tokenizer, _ = load_model(base)
    assert input_hooks(model) == []
    hook = model.register_forward_pre_hook(reverse_ids, with_kwargs=True)
    with pytest.raises(VerificationError, match="same greedy tokens as the trained policy"):
        export_model(model, tmp_path / "refused", base=base, processing_class=tokenizer)
    assert SAID in caplog.text
    hook.remove()
    caplog.clear()
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for source in (model, tmp_path / "saved"):
        result = export_model(source, tmp_path / "export", base=base, processing_class=tokenizer, overwrite=True)
        assert result.verification.passed
    assert SAID not in caplog.text
