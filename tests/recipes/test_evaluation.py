"""The answers that an evaluation counts as right."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from packaging.version import Version

from tests.support.training import grpo_trainer, rows

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.rollouts.rollouts import FastRollouts

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


needs_5_24 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts need transformers 5.24"
)


@needs_5_24
def test_held_out_rows_go_the_way_of_rollouts_and_are_answered_the_same(qwen: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from grpo_toolkit import FastRolloutCallback, PackedVisionCallback
    from grpo_toolkit.model.rollouts.rollouts import rollouts_of
    from grpo_vlm.training.evaluation import generate_texts

    fast = FastRolloutCallback("fast", strict=True)
    asked: list[tuple[list[str], int]] = []

    class Ask(TrainerCallback):
        """Asks six rows in batches of four: by copies the second batch has four, too."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken: Any = rollouts_of(kwargs["model"])
            for batch in (fast.batch, None):
                before = taken.count
                settings: dict[str, Any] = {"max_new_tokens": 6, "packed_vision": True, "fast_batch": batch}
                texts = generate_texts(kwargs["model"], kwargs["processing_class"], rows(6), **settings)
                asked.append((texts, taken.count - before))

    callbacks = [PackedVisionCallback(), fast, Ask()]
    assert fast.batch is None
    trainer = grpo_trainer(qwen, tmp_path, callbacks, per_device_eval_batch_size=4)
    trainer.train()
    assert [count for _, count in asked] == [2, 0] * 2
    for (quick, _), (plain, _) in zip(asked[::2], asked[1::2], strict=True):
        assert quick == plain
        assert len(plain) == 6
    assert fast.batch is None


@needs_5_24
def test_trls_own_evaluation_is_fast_already(qwen: Path, tmp_path: Path) -> None:
    """It samples through the same `generate` as rollouts do."""
    from grpo_toolkit import FastRolloutCallback

    counts: dict[bool, int] = {}
    for evaluates in (False, True):
        callback = FastRolloutCallback("fast", strict=True)
        options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(2)}
        trainer = grpo_trainer(
            qwen, tmp_path / str(evaluates), [callback], per_device_eval_batch_size=4, **(options if evaluates else {})
        )
        kept: list[FastRollouts] = []
        trainer.add_callback(keeping(callback, kept))
        trainer.train()
        counts[evaluates] = kept[0].count
    assert counts[False] == 2
    assert counts[True] > counts[False]


def keeping(callback: Any, kept: list[Any]) -> Any:
    """Return a callback that keeps the rollouts of a training, which are let go of at its end."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not kept:
                kept.append(callback._rollouts)

    return Keep()
