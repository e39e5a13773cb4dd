"""FastRolloutCallback in real GRPO trainings of a tiny Qwen2.5-VL."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import TrainerCallback

from grpo_toolkit import FastRolloutCallback, InputError, KVCacheCallback, ResumeGuardCallback
from grpo_toolkit.model.cache_probe import Decoding
from grpo_toolkit.model.rollouts import rollouts
from grpo_toolkit.model.rollouts.rollouts import rollouts_of
from tests.support.training import LANGUAGE_QV, grpo_trainer, rows

if TYPE_CHECKING:
    from pathlib import Path

needs_5_24 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)


class Rolled(TrainerCallback):  # type: ignore[misc]
    """A callback that keeps each rollout's text, and counts the fast ones and their prefilled rows at each step."""

    def __init__(self) -> None:
        self.said: list[list[list[int]]] = []
        self.counts: list[tuple[int, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        generate = inner.generate

        def listened(*positional: Any, **named: Any) -> Any:
            output = generate(*positional, **named)
            self.said.append(output[:, named["input_ids"].shape[1] :].tolist())
            return output

        inner.generate = listened

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = rollouts_of(kwargs["model"])
        self.counts.append((0, 0) if taken is None else (taken.count, taken.prefilled))


def train(model: Any, folder: Path, *callbacks: Any, resume: Path | None = None, **options: Any) -> tuple[Any, Rolled]:
    rolled = Rolled()
    # Rates and temperature at which a tiny model says more than one thing.
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "temperature": 3.0, "learning_rate": 1e-2}
    trainer = grpo_trainer(model, folder, [*callbacks, rolled], **(settings | options))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, rolled


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@needs_5_24
def test_a_full_training(qwen: Path, tmp_path: Path) -> None:
    callback, cache = FastRolloutCallback("fast"), KVCacheCallback()
    trainer, rolled = train(qwen, tmp_path, cache, callback, save_strategy="steps", save_steps=2)
    assert rolled.counts == [(1, 2), (2, 4)]  # two prompts of eight rows, in each of two steps
    assert callback.failures == []
    assert callback.chosen == "fast"
    assert cache.decoding is Decoding.CACHED
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["FastRolloutCallback"] == {
        "args": {"way": "fast", "trial": False, "kl_limit": 0.05, "strict": False},
        "attributes": {"chosen": "fast"},
    }
    assert rollouts_of(trainer.model) is None
    # In float32 the sampler's policy is the one that is trained.
    kl = [entry["sampling/rollout_kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 <= value < 1e-6 for value in kl)
    assert callback.kl == kl[-1]


@needs_5_24
def test_the_copy_follows_an_adapter_through_its_steps(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    class Compare(TrainerCallback):  # type: ignore[misc]
        """A callback that asks copy and live model for the same logits, before the first step and after each."""

        gaps: list[float] = []  # noqa: RUF012
        moved: list[float] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken: Any = rollouts_of(kwargs["model"])
            ids = torch.tensor([[40, 41, 42, 43]])
            with torch.no_grad():
                before = taken._copy.model(input_ids=ids).logits
                taken._copy.refresh(is_dirty=taken._is_dirty)
                after = taken._copy.model(input_ids=ids).logits
                self.gaps.append(float((after - kwargs["model"](input_ids=ids).logits).abs().max()))
            self.moved.append(float((after - before).abs().max()))

    adapter = LoraConfig(r=4, lora_alpha=64, target_modules=LANGUAGE_QV, task_type="CAUSAL_LM")
    compare, callback = Compare(), FastRolloutCallback("fast")
    _, rolled = train(qwen, tmp_path, callback, compare, peft_config=adapter, max_steps=3)
    assert callback.failures == []
    assert rolled.counts == [(1, 2), (2, 4), (3, 6)]
    assert max(compare.gaps) < 1e-4
    assert min(compare.moved) > 1e-4


@needs_5_24
@pytest.mark.parametrize("bf16", [False, True])
def test_same_seed_same_way_same_tokens_also_after_a_resume(qwen: Path, tmp_path: Path, bf16: bool) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": bf16}
    whole, first = train(qwen, tmp_path / "whole", FastRolloutCallback("fast"), **options)
    _, second = train(qwen, tmp_path / "again", FastRolloutCallback("fast"), **options)
    assert len(first.said) == 4
    assert len({str(said) for said in first.said}) == 4
    assert second.said == first.said
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    # Without the guard transformers 5 resumes a Qwen2.5-VL from its base's weights.
    both = (ResumeGuardCallback(checkpoint), FastRolloutCallback("fast"))
    resumed, third = train(qwen, tmp_path / "resumed", *both, resume=checkpoint, **options)
    assert third.said == first.said[2:]
    assert losses(resumed)[-2:] == losses(whole)[-2:]


@needs_5_24
def test_auto_takes_the_checkpoints_way(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_toolkit.callbacks import fast_rollout

    monkeypatch.setattr(fast_rollout, "_NO_GPU", None)  # as if this were one
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train(qwen, tmp_path / "plain", FastRolloutCallback("plain"), **options)
    callback = FastRolloutCallback()
    _, rolled = train(qwen, tmp_path / "resumed", callback, resume=tmp_path / "plain" / "checkpoint-1", **options)
    assert callback.chosen == "plain"
    assert rolled.counts == [(0, 0)]
    callback = FastRolloutCallback()
    _, rolled = train(qwen, tmp_path / "new", callback, **options)
    assert (callback.chosen, rolled.counts) == ("fast", [(1, 2), (2, 4)])


def test_plain_and_auto_on_a_cpu_leave_a_training_as_it_is(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, first = train(qwen, tmp_path / "alone")
    with caplog.at_level(logging.WARNING, logger="grpo_toolkit"):
        for way in ("plain", "auto"):
            callback = FastRolloutCallback(way)  # type: ignore[arg-type]
            trainer, rolled = train(qwen, tmp_path / way, callback)
            assert callback.chosen == "plain"
            assert rolled.said == first.said
            assert losses(trainer) == losses(alone)
    assert [record.message for record in caplog.records if "rollouts" in record.message] == []


@needs_5_24
def test_a_failure_is_reported_once_and_training_goes_on(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = train(qwen, tmp_path / "alone")

    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(rollouts, "prefill", fail)
    callback = FastRolloutCallback("fast")
    _, rolled = train(qwen, tmp_path / "failing", callback)
    assert rolled.said == first.said
    assert callback.chosen == "plain"
    [failure] = callback.failures
    assert failure.endswith("rollouts are plain from here on, failed: RuntimeError: no compiler")
    assert sum("no compiler" in record.message for record in caplog.records) == 1
    with pytest.raises(RuntimeError, match="no compiler"):
        train(qwen, tmp_path / "strict", FastRolloutCallback("fast", strict=True))


@needs_5_24
def test_an_evaluation_goes_the_same_way(qwen: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    callback = FastRolloutCallback("fast")
    trainer, rolled = train(qwen, tmp_path, callback, eval_dataset=rows(2), max_steps=1, **options)
    assert rolled.counts == [(1, 2)]
    assert len(rolled.said) == 2
    assert callback.failures == []
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@needs_5_24
def test_a_distance_past_the_limit_is_a_warning(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = rollouts.prefill

    def prefill(model: Any, found: Any) -> Any:
        found.inputs["attention_mask"] = torch.ones_like(found.inputs["attention_mask"])
        found.inputs["pixel_values"] = torch.zeros_like(found.inputs["pixel_values"])
        return whole(model, found)

    monkeypatch.setattr(rollouts, "prefill", prefill)
    callback = FastRolloutCallback("fast", kl_limit=1e-4)
    train(qwen, tmp_path, callback)
    assert callback.kl is not None
    assert callback.kl > 1e-4
    assert sum("nats a token" in record.message for record in caplog.records) == 1


@needs_5_24
@pytest.mark.parametrize("least", [5, 8])
def test_the_distance_is_measured_where_completions_have_a_least_length(
    qwen: Path, tmp_path: Path, least: int
) -> None:
    callback = FastRolloutCallback("fast")
    _, rolled = train(qwen, tmp_path, callback, generation_kwargs={"min_new_tokens": least})
    assert len(rolled.said[0][0]) == 8
    assert callback.failures == []
    assert callback.kl is not None
    assert 0 <= callback.kl < 1e-6


@needs_5_24
def test_the_distance_is_in_the_run_that_is_open(qwen: Path, tmp_path: Path) -> None:
    """The trainer's own W&B callback is handed the log before ours adds to it."""
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path)
    try:
        callback = FastRolloutCallback("fast")
        trainer, _ = train(qwen, tmp_path / "out", callback, report_to="wandb")
        assert run.summary["sampling/rollout_kl"] == callback.kl
        assert run.summary["train/global_step"] == trainer.state.global_step == 2
        assert "train/sampling/rollout_kl" not in dict(run.summary)
    finally:
        run.finish()


@needs_5_24
def test_a_tracker_that_fails_is_said_once_and_harms_nothing(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, row: dict[str, float]) -> None:
            raise ConnectionError("no server")

    monkeypatch.setattr("grpo_toolkit.reporting.trackers.wandb_run.active_run", Broken)
    callback = FastRolloutCallback("fast")
    trainer, _ = train(qwen, tmp_path, callback)
    assert trainer.state.global_step == 2
    assert callback.failures == []
    assert [message for message in caplog.messages if "no server" in message] == [
        "grpo_toolkit: W&B takes no sampling/rollout_kl (scalars: ConnectionError: no server)"
    ]


def test_what_it_cannot_do_is_told_in_a_line(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("grpo_toolkit.model.rollouts.supported.OLDEST", "99.0")
    callback = FastRolloutCallback("fast")
    train(qwen, tmp_path, callback, max_steps=1)
    assert callback.chosen == "plain"
    told = [record.message for record in caplog.records if "go the plain way" in record.message]
    assert told == [
        f"grpo_toolkit: rollouts go the plain way: transformers {transformers.__version__} is older than 99.0"
    ]
    with pytest.raises(InputError, match="'quick': it is one of 'auto', 'fast', 'plain'"):
        FastRolloutCallback("quick")  # type: ignore[arg-type]


@needs_5_24
def test_all_ranks_follow_one_that_cannot(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo_toolkit.callbacks import fast_rollout

    monkeypatch.setattr(fast_rollout, "exchange", lambda reason: [reason, "they need 9.9 GB"])
    callback = FastRolloutCallback("fast")
    _, rolled = train(qwen, tmp_path, callback, max_steps=1)
    assert (callback.chosen, rolled.counts) == ("plain", [(0, 0)])
    assert "grpo_toolkit: rollouts go the plain way: they need 9.9 GB" in caplog.messages


@needs_5_24
def test_a_second_training_of_one_trainer_chooses_anew(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo_toolkit.callbacks import fast_rollout

    callback = FastRolloutCallback()
    trainer = grpo_trainer(qwen, tmp_path, [callback], max_steps=1)
    trainer.train()
    assert callback.chosen == "plain"
    trainer.train()
    assert "go the plain way" not in caplog.text  # no checkpoint was trained with plain ones
    monkeypatch.setattr(fast_rollout, "_NO_GPU", None)  # as if there were one now
    trainer.train()
    assert callback.chosen == "fast"


@needs_5_24
def test_a_checkpoint_from_before_it_is_resumed_and_saved(qwen: Path, tmp_path: Path) -> None:
    """The trainer looks up every stateful callback by name when it saves, in what it has read from the checkpoint."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train(qwen, tmp_path / "before", **options)
    callback = FastRolloutCallback("fast")
    _, rolled = train(qwen, tmp_path / "after", callback, resume=tmp_path / "before" / "checkpoint-1", **options)
    assert rolled.counts == [(1, 2)]
    state = json.loads((tmp_path / "after" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FastRolloutCallback"]["attributes"] == {"chosen": "fast"}
