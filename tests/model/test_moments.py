"""An optimizer's moments across versions of transformers: groups of another rule, experts one by one or stacked."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainerState, TrainingArguments

from grpo_toolkit import ResumeGuardCallback
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.errors import ResumeError
from grpo_toolkit.model.moments import NAMES, Match, matched, named_groups
from grpo_toolkit.model.resume_window import leave_moments, match_moments
from tests.support.models import build_llama

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
STACKS = {name: ROOT / f".venv{name}" / "bin" / "python" for name in ("", "-middle", "-oldest")}


class EverythingDecays(Trainer):
    """The groups of transformers 4.49 for a model whose norms are no LayerNorm: only biases do not decay."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if "bias" not in name]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("bases") / "llama")


def trainer_of(kind: type[Trainer], base: Path, out: Path, callbacks: list[Any], *, steps: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none",
        use_cpu=True, save_strategy="steps", save_steps=2, disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    return kind(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": [1, 2, 3, index], "labels": [1, 2, 3, index]} for index in range(8)],
        processing_class=AutoTokenizer.from_pretrained(base),
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        callbacks=callbacks,
    )


def moments_of(trainer: Any) -> dict[str, torch.Tensor]:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        name: optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter in optimizer.state
    }


class Loaded(TrainerCallback):
    """A callback that notes what an optimizer has before the first step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.moments: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.moments = moments_of(self.trainer)


def resumed(
    kind: type[Trainer], base: Path, checkpoint: Path, out: Path, callbacks: list[Any]
) -> dict[str, torch.Tensor]:
    """Go on from a checkpoint, and return the moments that were there before the first step."""
    shutil.copytree(checkpoint, out / checkpoint.name)
    look = Loaded()
    look.trainer = trainer_of(kind, base, out, [*callbacks, look], steps=3)
    look.trainer.train(resume_from_checkpoint=str(out / checkpoint.name))
    return look.moments


@pytest.mark.parametrize("with_names", [True, False])
def test_moments_in_the_groups_of_another_version_are_loaded_by_name(
    llama: Path, tmp_path: Path, with_names: bool, caplog: pytest.LogCaptureFixture
) -> None:
    saved = trainer_of(
        EverythingDecays, llama, tmp_path / "saved", [ResumeGuardCallback()] if with_names else [], steps=2
    )
    saved.train()
    checkpoint = tmp_path / "saved" / "checkpoint-2"
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [NAMES in group for group in groups] == [with_names] * 2

    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):  # the fault
        resumed(Trainer, llama, checkpoint, tmp_path / "plain", [])

    guard = ResumeGuardCallback()
    found, wanted = resumed(Trainer, llama, checkpoint, tmp_path / "guarded", [guard]), moments_of(saved)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert guard.moments is not None
    assert (guard.moments.total, guard.moments.lacking, guard.moments.foreign) == (len(wanted), (), ())
    assert guard.moments.moved
    assert "the optimizer's moments of all" in caplog.text
    assert ("by name" if with_names else "by the order that the version") in caplog.text


def test_a_trainer_state_of_a_newer_version_is_read(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = TrainerState.__dict__["load_from_json"]
    trainer_of(Trainer, llama, tmp_path / "saved", [], steps=2).train()
    path = tmp_path / "saved" / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_newer_version": 1}))
    with pytest.raises(TypeError, match="of_a_newer_version"):  # the fault
        resumed(Trainer, llama, path.parent, tmp_path / "plain", [])
    assert resumed(Trainer, llama, path.parent, tmp_path / "again", [ResumeGuardCallback()])
    assert "left out: of_a_newer_version" in caplog.text
    assert TrainerState.__dict__["load_from_json"] is before


def test_a_resume_on_one_stack_moves_nothing_and_nothing_stays_watched(llama: Path, tmp_path: Path) -> None:
    before = Optimizer.load_state_dict
    trainer_of(Trainer, llama, tmp_path / "saved", [], steps=2).train()
    guard = ResumeGuardCallback()
    resumed(Trainer, llama, tmp_path / "saved" / "checkpoint-2", tmp_path / "again", [guard])
    assert guard.moments is not None
    assert guard.moments.moved == 0
    assert Optimizer.load_state_dict is before


def test_other_optimizers_are_let_through_and_a_trainer_that_is_dropped_leaves_nothing(
    llama: Path, tmp_path: Path
) -> None:
    before = Optimizer.load_state_dict
    trainer = trainer_of(Trainer, llama, tmp_path, [ResumeGuardCallback()], steps=2)
    other = torch.nn.Linear(2, 2)
    optimizer = AdamW(other.parameters())
    other(torch.ones(2)).sum().backward()
    optimizer.step()
    AdamW(other.parameters()).load_state_dict(optimizer.state_dict())
    assert Optimizer.load_state_dict is not before
    del trainer
    gc.collect()
    AdamW(other.parameters()).load_state_dict(optimizer.state_dict())
    assert Optimizer.load_state_dict is before


def test_moments_that_cannot_be_told_stop_the_resume_with_the_way_out(llama: Path, tmp_path: Path) -> None:
    trainer_of(EverythingDecays, llama, tmp_path / "saved", [], steps=2).train()
    path = tmp_path / "saved" / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["param_groups"][0]["params"].pop()
    torch.save(state, path)
    with pytest.raises(ResumeError, match=r"names no parameters.*move optimizer\.pt and scheduler\.pt out of"):
        resumed(Trainer, llama, path.parent, tmp_path / "again", [ResumeGuardCallback()])


class OneByOne(torch.nn.Module):
    """Experts as transformers 4.x has them, and a layer beside."""

    def __init__(self) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({
                "gate_proj": linear(3, 2, bias=False),
                "up_proj": linear(3, 2, bias=False),
                "down_proj": linear(2, 3, bias=False),
            })
            for _ in range(3)
        )  # fmt: skip
        self.router = linear(3, 3)

    def stacked(self) -> dict[str, torch.Tensor]:
        gate_up = [torch.cat([one["gate_proj"].weight, one["up_proj"].weight]) for one in self.experts]  # type: ignore[index]
        return {
            "gate_up_proj": torch.stack(gate_up),
            "down_proj": torch.stack([one["down_proj"].weight for one in self.experts]),
        }  # type: ignore[index]


class Stacked(torch.nn.Module):
    """The same as transformers 5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(3, 3)  # another order, too
        self.experts = torch.nn.Module()
        self.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 4, 3))
        self.experts.down_proj = torch.nn.Parameter(torch.zeros(3, 3, 2))


def stepped(model: torch.nn.Module, *, without: str = "none") -> AdamW:
    optimizer = AdamW(model.parameters())
    for name, parameter in model.named_parameters():
        if without not in name:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def loaded(saved: AdamW, of: torch.nn.Module, into: torch.nn.Module) -> tuple[AdamW, Match]:
    names = named_groups(saved, of)
    assert names is not None
    state = saved.state_dict()
    state["param_groups"][0][NAMES] = names[0]
    found: list[Match] = []
    match_moments(into, found.append)
    optimizer = AdamW(into.parameters())
    try:
        optimizer.load_state_dict(state)
    finally:
        leave_moments(into)
    return optimizer, found[0]


def test_experts_one_by_one_and_stacked_have_the_same_moments() -> None:
    torch.manual_seed(0)
    single, stack = OneByOne(), Stacked()
    before = stepped(single)
    optimizer, match = loaded(before, single, stack)
    assert (match.total, match.lacking, match.foreign) == (4, (), ())
    moment = optimizer.state[stack.experts.gate_up_proj]["exp_avg"]  # type: ignore[index]
    for number, expert in enumerate(single.experts):
        parts = [before.state[expert[part].weight]["exp_avg"] for part in ("gate_proj", "up_proj")]  # type: ignore[index]
        assert torch.equal(moment[number], torch.cat(parts))
    again, match = loaded(optimizer, stack, single)
    assert (match.total, match.lacking, match.foreign) == (11, (), ())
    for name, parameter in single.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(again.state[parameter][key], before.state[parameter][key]), name


def test_an_expert_that_no_token_has_reached_has_no_moments_and_is_told() -> None:
    single, stack = OneByOne(), Stacked()
    before = stepped(single, without="experts.1.")
    one_more = single.experts[0]["down_proj"].weight  # type: ignore[index]
    before.state[one_more]["step"] += 1
    optimizer, match = loaded(before, single, stack)
    assert not optimizer.state[stack.experts.gate_up_proj]["exp_avg"][1].any()  # type: ignore[index]
    assert float(optimizer.state[stack.experts.down_proj]["step"]) == 2.0  # type: ignore[index]
    assert match.uneven == ("experts.down_proj",)
    assert "count as many" in str(match)


def test_parameters_without_moments_are_named() -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    state = stepped(small).state_dict()
    state["param_groups"][0][NAMES] = ["weight", "bias"]
    match = matched(state, [["weight", "bias"]], large, family_of(None))
    assert match is not None
    assert match.lacking == ("weight",)


@pytest.mark.parametrize(
    ("one", "other", "model"),
    [
        (*stacks, model)
        for stacks in (("", "-middle"), ("-middle", ""), ("", "-oldest"), ("-oldest", ""))
        for model in ("qwen2_5_vl", "qwen2_5_vl+lora", "qwen3_moe")
        if not (model == "qwen3_moe" and "-oldest" in stacks)  # 4.49 has no such model
    ],
)
def test_a_checkpoint_of_one_stack_goes_on_under_another(one: str, other: str, model: str, tmp_path: Path) -> None:
    """Both in processes of their own environments, which have to lie beside each other (`scripts/test middle`)."""
    if not all(STACKS[stack].with_name("activate").is_file() for stack in (one, other)):
        pytest.skip("needs the environments of two stacks")
    run: Callable[..., Any] = subprocess.run
    for stack, what in ((one, "save"), (other, "resume")):
        command = [str(STACKS[stack]), "-m", "scripts.models.resumed_training", what, model]
        done = run(
            [*command, str(tmp_path / "base"), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True,
            timeout=500, check=False, env=dict(os.environ),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    saved, found = (json.loads((tmp_path / "out" / f"{what}.json").read_text()) for what in ("save", "resume"))
    assert found == saved  # whatever the order of the parameters
