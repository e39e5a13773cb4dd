"""The answers that an evaluation counts as right."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


@pytest.mark.parametrize(("direct", "share"), [(True, 1.0), (False, 1 / 4)])
def test_a_base_asked_for_the_answer_alone_may_word_it(
    monkeypatch: pytest.MonkeyPatch, direct: bool, share: float
) -> None:
    from datasets import Dataset

    from grpo_vlm.training import evaluation

    said = ["There are 3 items.", "\\boxed{3}", "**B**", "<think>x</think><answer>B</answer>"]
    # A tiny model words nothing.
    monkeypatch.setattr(evaluation, "generate_texts", lambda *given, **options: said)
    rows = Dataset.from_dict({"answer": ["3", "3", "B", "B"], "answer_type": ["number", "number", "choice", "choice"]})
    assert evaluation.held_out_accuracy(None, None, rows, max_new_tokens=8, direct=direct) == share
