"""The seams on a trainer that a CPU cannot run: vLLM's, by their names, on a stand-in with the same ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from grpo_toolkit.step_time.clock import StepClock, measure
from grpo_toolkit.step_time.seams.model import ModelSeams
from grpo_toolkit.step_time.seams.notes import StepNotes
from grpo_toolkit.step_time.seams.trainer import TrainerSeams
from tests.support.models import build_llama


class Engine:
    """A trainer's `vllm_generation`, whose calls move a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sync_weights(self) -> None:
        self.now_s += 3.0

    def generate(self, prompts: list[str]) -> list[str]:
        self.now_s += 5.0
        return prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(build_llama(tmp_path_factory.mktemp("bases") / "llama"))


def test_vllms_calls_are_phases_in_a_step_alone_and_are_given_back(model: Any) -> None:
    engine = Engine()
    clock = StepClock(now=lambda: engine.now_s)
    seams = ModelSeams(model, clock)
    trainer = SimpleNamespace(vllm_generation=engine, reward_funcs=[len])
    ours = TrainerSeams(trainer, seams, None, on_reading=lambda: None)
    engine.sync_weights()  # an evaluation between steps
    clock.take()
    seams.notes, seams.is_open = StepNotes(), True
    clock.switch("other")
    clock.take()
    engine.sync_weights()
    assert engine.generate(["a"]) == ["a"]
    assert trainer.reward_funcs[0]("abc") == 3
    found = measure(clock.take(), None).paths_s
    assert found == {("other",): 0.0, ("weight_sync",): 3.0, ("rollout", "vllm"): 5.0, ("rewards", "len"): 0.0}
    ours.close()
    seams.close()
    assert vars(engine).keys() == {"now_s"}
    assert trainer.reward_funcs == [len]
    assert "generate" not in vars(model)


def test_an_async_reward_function_stays_one(model: Any) -> None:
    async def reward(**_: Any) -> list[float]:
        return []

    seams = ModelSeams(model, StepClock())
    trainer = SimpleNamespace(reward_funcs=[reward])
    ours = TrainerSeams(trainer, seams, None, on_reading=lambda: None)
    assert trainer.reward_funcs == [reward]
    ours.close()
    seams.close()


def test_a_call_that_raises_ends_its_phase(model: Any) -> None:
    def fails(**_: Any) -> list[float]:
        raise ValueError("no answer")

    clock = StepClock()
    seams = ModelSeams(model, clock)
    trainer = SimpleNamespace(reward_funcs=[fails])
    ours = TrainerSeams(trainer, seams, None, on_reading=lambda: None)
    seams.notes, seams.is_open = StepNotes(), True
    with pytest.raises(ValueError, match="no answer"):
        trainer.reward_funcs[0]()
    assert clock.path == ("other",)
    ours.close()
    seams.close()
