"""Lengths at which a GPU's attention kernel returns gradients that are no numbers: kept off it, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback

from grpo_toolkit.callbacks import KVCacheCallback, kv_cache
from grpo_toolkit.model.attention.cudnn_gradients import PROBED, REST, GradientsWithoutCudnn, loses_gradients
from grpo_toolkit.model.load import load_model
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

BAD, GOOD = 192, 128


def cudnn_enabled() -> bool:
    backends: Any = torch.backends.cuda
    return bool(backends.cudnn_sdp_enabled())


def attention_calls(model: Any) -> list[tuple[int, bool]]:
    """Return a list that each attention call of the language model adds its length to, and whether cuDNN may serve."""
    seen: list[tuple[int, bool]] = []
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["hidden_states"].shape[1], cudnn_enabled())),
            with_kwargs=True,
        )
    return seen


@pytest.mark.parametrize("adapter", [False, True])
def test_forward_and_recompute_of_such_a_length_go_another_way(adapter: bool, qwen: Path) -> None:
    model = load_model(qwen)[0]
    seen, layers = attention_calls(model), len(model.get_decoder().layers)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        model.enable_input_require_grads()
    guard = GradientsWithoutCudnn(model)
    for length in (GOOD, BAD):
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    assert seen == [(GOOD, True)] * 2 * layers + [(BAD, False)] * 2 * layers  # forward, and again in the backward
    assert not cudnn_enabled()
    guard.end_of_step()
    seen.clear()
    with torch.no_grad():
        model(input_ids=torch.arange(BAD)[None])
    assert seen == [(BAD, True)] * layers  # wants no gradient
    model(input_ids=torch.arange(BAD)[None])
    guard.close()
    assert cudnn_enabled()


@pytest.mark.parametrize("loses", [False, True])
def test_a_training_is_guarded_where_the_device_needs_it(
    loses: bool, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_cache, "loses_gradients", lambda device, dtype: loses)
    trainer = grpo_trainer(qwen, tmp_path, [KVCacheCallback(strict=True)], max_steps=2)
    seen = attention_calls(trainer.model)
    # Every length of this training is taken for one of those: tiny prompts have no 192 tokens.
    monkeypatch.setattr("grpo_toolkit.model.attention.cudnn_gradients.TILE", 1)
    monkeypatch.setattr("grpo_toolkit.model.attention.cudnn_gradients.REST", 0)
    trainer.train()
    assert ("returns NaN gradients on this GPU" in caplog.text) == loses
    assert {enabled for length, enabled in seen if length > 1} == ({True, False} if loses else {True})
    assert cudnn_enabled()


def test_a_compiled_training_is_kept_off_it_at_every_length_without_a_hook(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_cache, "loses_gradients", lambda device, dtype: True)
    callback = KVCacheCallback(strict=True)
    trainer = grpo_trainer(qwen, tmp_path, [callback], max_steps=2)
    trainer.args.torch_compile = True  # as the callbacks see it: compiling itself takes minutes here
    seen = attention_calls(trainer.model)
    hooks = {name: len(module._forward_pre_hooks) for name, module in trainer.model.named_modules()}
    found: list[dict[str, int]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append({name: len(module._forward_pre_hooks) for name, module in kwargs["model"].named_modules()})

    trainer.add_callback(Look())
    trainer.train()
    assert "all steps of this compiled training use another kernel" in caplog.text
    assert found == [hooks, hooks]
    assert {enabled for _, enabled in seen} == {False}
    assert cudnn_enabled()


def test_the_cpu_is_not_asked() -> None:
    assert not loses_gradients(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU whose attention has the fault")
def test_the_fault_and_the_cure_on_a_gpu(qwen: Path) -> None:
    device = torch.device("cuda")
    if not loses_gradients(device, torch.bfloat16):
        pytest.skip("this GPU, or this version of cuDNN, returns right gradients")
    model = load_model(qwen)[0].to(device, torch.bfloat16).train()
    tokens, mask = torch.arange(PROBED, device=device)[None], torch.ones(1, PROBED, device=device, dtype=torch.long)
    mask[:, :REST] = 0

    def lost() -> int:
        model.zero_grad()
        model(input_ids=tokens, attention_mask=mask).logits[:, -8:].sum().backward()
        return sum(not bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

    assert lost() > 0
    guard = GradientsWithoutCudnn(model)
    assert lost() == 0
    guard.close()
