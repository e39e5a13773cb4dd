"""StepTimeCallback in real trainings: phases that add up, the same training to the last bit, nothing left behind."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback

from grpo_toolkit import FastRolloutCallback, KVCacheCallback, PackedVisionCallback, StepTimeCallback
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts.rollouts import rollouts_of
from grpo_toolkit.step_time.clock import CudaStamps
from grpo_toolkit.step_time.store import FILE_NAME, load_step_review
from tests.callbacks.test_trainers import dpo, plain, recent_trl_only, rloo, sft
from tests.step_time.test_clock import Device, Event, Ticks
from tests.support.models import build_llama
from tests.support.training import LANGUAGE_QV, grpo_trainer, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("bases") / "llama")


class EachCall:
    """A clock that moves by one second whenever it is asked."""

    def __init__(self) -> None:
        self._ticks = itertools.count()
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s = float(next(self._ticks))
        return self.now_s


def measured(build: Callable[[list[Any]], Any], *, with_trainer: bool, **options: Any) -> tuple[StepTimeCallback, Any]:
    callback = StepTimeCallback(strict=True, floors=False, now=EachCall(), **options)
    trainer = build([callback])
    if with_trainer:
        callback.trainer = trainer
    trainer.train()
    return callback, trainer


def adds_up(callback: StepTimeCallback) -> None:
    assert callback.rows
    for row in callback.rows:
        assert sum(row.phases_s.values()) == pytest.approx(row.wall_s, rel=0.01)
        parts = {name: seconds for name, seconds in row.parts_s.items() if name.count("/") == 1}
        for phase, seconds in row.phases_s.items():
            inside = [part for name, part in parts.items() if name.startswith(f"{phase}/")]
            assert sum(inside) <= seconds + 1e-9


@pytest.mark.parametrize("with_trainer", [False, True])
def test_a_grpo_step_has_its_phases_and_they_add_up(qwen: Path, tmp_path: Path, with_trainer: bool) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "beta": 0.1, "num_iterations": 2}
    callback, _ = measured(lambda ours: grpo_trainer(qwen, tmp_path, ours, **settings), with_trainer=with_trainer)
    adds_up(callback)
    assert [row.step for row in callback.rows] == [1, 2, 3]
    first = callback.rows[0]
    common = {
        "reading_rows",
        "image_processing",
        "texts",
        "rollout",
        "old_logprobs",
        "forward",
        "backward",
        "optimizer",
    }
    shown = {"rewards", "reference_logprobs", "preparing"} if with_trainer else set()
    assert set(first.phases_s) - {"logging", "other"} == common | shown
    assert {
        "texts/tokenising",
        "texts/decoding",
        "rollout/prefill",
        "rollout/decode",
        "rollout/prefill/vision",
        "forward/vision",
    } <= set(first.parts_s)
    assert ("rewards/length_reward" in first.parts_s) == with_trainer
    assert "rollout" not in callback.rows[1].phases_s, "num_iterations trains on the same completions again"
    assert first.work.rollouts == 1
    assert first.work.rollout_rows == 8
    assert first.work.decode_steps == 7
    assert (first.work.forwards, first.work.forward_rows) == (2, 8)
    assert first.work.forward_patches == 8 * 16
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3]
    assert load_step_review(tmp_path).steps[0] == first


def test_all_time_of_a_training_is_in_some_step(llama: Path, tmp_path: Path) -> None:
    callback, _ = measured(
        lambda ours: plain(str(llama), tmp_path, ours, max_steps=3, eval_strategy="steps", eval_steps=2, save_steps=3),
        with_trainer=True,
    )
    adds_up(callback)
    # The clock moves by one a mark, so the steps follow each other without a gap where no mark is in two of them.
    assert sum(row.wall_s for row in callback.rows) == callback.now.now_s - 1  # type: ignore[attr-defined]
    assert "evaluation" in callback.rows[1].phases_s
    assert "saving" in callback.rows[2].phases_s
    assert "saving" not in callback.rows[0].phases_s


@pytest.mark.parametrize("build", [*(pytest.param(one, marks=recent_trl_only) for one in (sft, dpo, rloo)), plain])
@pytest.mark.parametrize("with_trainer", [False, True])
def test_other_trainers_have_the_phases_that_they_have(
    build: Any, with_trainer: bool, llama: Path, tmp_path: Path
) -> None:
    callback, _ = measured(lambda ours: build(str(llama), tmp_path, ours), with_trainer=with_trainer)
    adds_up(callback)
    phases = set(callback.rows[0].phases_s)
    assert {"reading_rows", "forward", "backward", "optimizer", "saving"} <= phases
    assert ("rollout" in phases) == (build is rloo)
    assert ("reference_logprobs" in phases) == ((build is dpo and with_trainer) or (build is rloo and with_trainer))


def _train(base: Path, folder: Path, callbacks: list[Any], *, peft: bool = False, late: bool = True) -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LANGUAGE_QV) if peft else None
    trainer = grpo_trainer(
        base, folder, callbacks, peft_config=config, max_steps=3, beta=0.1, gradient_accumulation_steps=2
    )
    for callback in callbacks:
        if isinstance(callback, StepTimeCallback):
            callback.trainer = trainer if late else None
    trainer.train()
    return trainer


@pytest.mark.parametrize("peft", [False, True])
def test_the_training_is_the_same_to_the_last_bit_and_everything_is_put_back(
    qwen: Path, tmp_path: Path, peft: bool
) -> None:
    _train(qwen, tmp_path / "first", [], peft=peft)  # TRL's first PEFT training in a process differs from its second
    plain_one = _train(qwen, tmp_path / "plain", [], peft=peft)
    callback = StepTimeCallback(strict=True)
    ours = _train(qwen, tmp_path / "ours", [callback], peft=peft)
    keys = ("loss", "grad_norm", "reward", "kl", "entropy")
    found, expected = (
        [{key: row[key] for key in keys} for row in trainer.state.log_history if "loss" in row]
        for trainer in (ours, plain_one)
    )
    assert len(found) == 3
    assert found == expected
    pairs = zip(ours.model.state_dict().items(), plain_one.model.state_dict().items(), strict=True)
    for (name, mine), (other, theirs) in pairs:
        assert name == other
        assert torch.equal(mine, theirs), name

    live = base_model(ours.model)
    assert "generate" not in vars(live)
    assert "generate_batch" not in vars(live)
    for attribute in ("get_batch_samples", "evaluate"):
        assert attribute not in vars(ours)
    assert ours.reward_funcs == plain_one.reward_funcs
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in live.named_modules()}
    assert hooks == {
        n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in base_model(plain_one.model).named_modules()
    }
    assert not hasattr(ours.processing_class.image_processor.preprocess, "__wrapped__")
    if peft:
        assert "reference_logprobs" in callback.rows[0].phases_s, "the reference is the model without its adapter"


@v5_only
@pytest.mark.parametrize("first", [False, True])
def test_beside_the_callbacks_that_make_a_step_faster(qwen: Path, tmp_path: Path, first: bool) -> None:
    callback = StepTimeCallback(strict=True, floors=False)
    others = [KVCacheCallback(), PackedVisionCallback(strict=True), FastRolloutCallback("fast", strict=True)]
    trainer = _train(qwen, tmp_path, [callback, *others] if first else [*others, callback])
    assert others[2].chosen == "fast"
    rows = callback.rows
    assert [row.step for row in rows] == [1, 2, 3]
    assert {"rollout/prefill", "rollout/decode"} <= set(rows[0].parts_s)
    assert rows[0].work.forward_patches <= 4 * 16, "two prompts, shuffled over two micro-batches of four"
    assert rollouts_of(trainer.model) is None
    assert "generate" not in vars(base_model(trainer.model))
    trainer.train()  # a second training finds the seams as they were
    assert len(callback.rows) == 3


def test_a_seam_that_fails_leaves_the_training_alone(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo_toolkit.step_time.seams import model as model_seams

    def fail(*_: Any) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(model_seams, "token_shape", fail)
    callback = StepTimeCallback(floors=False)
    trainer = _train(qwen, tmp_path / "failed", [callback])
    assert trainer.state.global_step == 3
    assert callback.rows == []
    assert "measuring the time of a step failed and is off from here on" in caplog.text
    monkeypatch.undo()
    plain_one = _train(qwen, tmp_path / "plain", [])
    assert [row.get("loss") for row in trainer.state.log_history] == [
        row.get("loss") for row in plain_one.state.log_history
    ]


def test_a_copy_and_a_pickle_of_the_model_in_training_carry_no_clock(qwen: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Copies(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.copy = copy.deepcopy(kwargs["model"])
            inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
            with torch.no_grad():
                self.copy(**inputs)
            self.length = self.copy.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1]
            pickle.loads(pickle.dumps([hook for hook in kwargs["model"]._forward_hooks.values()]))  # noqa: C416

    copies, callback = Copies(), StepTimeCallback(strict=True, floors=False)
    _train(qwen, tmp_path, [callback, copies])
    assert copies.length == 5
    assert all(row.work.rollouts == 1 for row in callback.rows), "the copy's rollout is no rollout of the training"


@pytest.mark.parametrize(("awaited_s", "times"), [(600.0, 1), (0.0, 2)])
def test_a_long_training_is_explained_early_too(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], awaited_s: float,
    times: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("grpo_toolkit.callbacks.step_time.AWAITED_S", awaited_s)
    callback = StepTimeCallback(strict=True, floors=False)
    plain(str(llama), tmp_path, [callback], max_steps=7).train()
    assert capsys.readouterr().err.count("step time   ") == times


def test_no_synchronisation_is_added(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that works behind the host: its events are recorded, asked whether they are reached, and never waited
    for before the training is over."""
    device = Device(Ticks())
    clock = EachCall()
    waits: list[str] = []

    def now() -> float:
        device.host.now_s = clock()
        device.launch(0.3)  # something is always under way
        return device.host.now_s

    stamps = CudaStamps(device.event, wait=lambda: (waits.append("end"), device.wait()))
    monkeypatch.setattr("grpo_toolkit.callbacks.step_time.stamps_of_device", lambda _: stamps)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append("synchronize"))
    monkeypatch.setattr(Event, "synchronize", lambda _: waits.append("event"))
    callback = StepTimeCallback(strict=True, floors=False, now=now, every=4)
    trainer = grpo_trainer(qwen, tmp_path, [callback], max_steps=9)
    callback.trainer = trainer
    trainer.train()
    assert waits in ([], ["end"])
    rows = callback.rows
    assert [row.step for row in rows] == list(range(1, 10))
    sampled = [row.step for row in rows if row.phases_s]
    assert sampled == [1, 2, 3, 4, 5, 8]
    for row in rows:
        assert row.clock == ("events" if row.step in sampled else "host")
        if row.phases_s:
            assert sum(row.phases_s.values()) == pytest.approx(row.wall_s, rel=0.01)
    assert device.made < 3 * 120, "events are used again"


@v5_only
def test_a_step_whose_rollouts_compile_anew_is_left_out_of_the_mean(llama: Path, tmp_path: Path) -> None:
    class Compiles(TrainerCallback):
        """Have the third step meet a new length, as on a GPU, where nothing but `compiled` tells of it."""

        def on_step_begin(self, *args: Any, model: Any, **_: Any) -> None:
            rollouts = rollouts_of(model)
            assert rollouts is not None
            if args[1].global_step == 2:
                inner = rollouts._config
                rollouts._config = lambda *given: rollouts.compiled.add((4, 512)) or inner(*given)  # type: ignore[func-returns-value,method-assign]

    callback, _ = measured(
        lambda ours: grpo_trainer(
            llama,
            tmp_path,
            [FastRolloutCallback("fast", strict=True), *ours, Compiles()],
            with_images=False,
            max_steps=5,
        ),
        with_trainer=True,
    )
    assert [row.is_first for row in callback.rows] == [True, False, True, False, False]
    assert callback.explanation is not None
    assert callback.explanation.steps == 2  # the second is looked at closely
