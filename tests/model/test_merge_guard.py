"""The base under an adapter that TRL merges for vLLM: how it drifts, and how it is kept."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.callbacks import KVCacheCallback
from grpo_toolkit.model import merge_guard
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.merge_guard import guard_merges
from tests.support.training import LANGUAGE_QV, grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

    import torch

pytestmark = pytest.mark.stack


def adapted(base: Path, **options: Any) -> Any:
    """The base in bfloat16 under an adapter that says something."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_model(base)[0].to(torch.bfloat16)
    options = {"r": 4, "target_modules": LANGUAGE_QV, "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**options))


def base_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if not tensor.equal(after[name])]


def weights_for_vllm(model: Any) -> Any:
    """TRL's own walk over the weights that it sends to vLLM: a generator that merges, yields and unmerges."""
    distributed = pytest.importorskip("trl.distributed", reason="older TRL has the walk inside what calls vLLM")
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    generation = object.__new__(VLLMGeneration)  # its __init__ starts vLLM
    generation.model = model
    generation._dist = distributed.DistributedBackend(Accelerator(cpu=True))
    return generation._iter_named_params()


def test_trls_sync_makes_the_base_drift_and_the_guard_keeps_it(qwen: Path) -> None:
    plain, guarded = adapted(qwen), adapted(qwen)
    before = base_state(plain)
    guard_merges(guarded)
    for _ in range(3):
        sent = [{name: data.clone() for name, data in weights_for_vllm(model)} for model in (plain, guarded)]
    drifted = differing(before, base_state(plain))
    assert drifted
    assert all("q_proj" in name or "v_proj" in name for name in drifted)
    assert differing(before, base_state(guarded)) == []
    clean = {name: data.clone() for name, data in weights_for_vllm(adapted(qwen))}
    assert differing(clean, sent[0])  # what vLLM decodes with drifts too
    assert differing(clean, sent[1]) == []


def test_a_training_leaves_the_base_as_it_was(qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import TrainerCallback

    class Sync(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            for _ in weights_for_vllm(model):
                pass

    found = {}
    for name, callbacks in (("plain", [Sync()]), ("ours", [KVCacheCallback(strict=True), Sync()])):
        model = adapted(qwen)
        before = base_state(model)
        grpo_trainer(model, tmp_path / name, callbacks, gradient_checkpointing=False).train()
        found[name] = differing(before, base_state(model))
    assert found["plain"]
    assert found["ours"] == []
    said = [record.message for record in caplog.records if "bit for bit" in record.message]
    assert len(said) == 1


def test_an_abandoned_sync_is_taken_out_before_the_next_training_forward(
    qwen: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    learns = {}
    for name in ("plain", "ours"):
        model = adapted(qwen).train()
        before = base_state(model)
        if name == "ours":
            guard_merges(model)
        walk = weights_for_vllm(model)
        next(walk)
        walk.close()  # as when vLLM fails at a tensor
        learns[name] = model(input_ids=torch.tensor([[1, 2, 3]])).logits.requires_grad
    assert learns == {"plain": False, "ours": True}
    assert differing(before, base_state(model)) == []
    assert "not taken out again" in caplog.text


def test_after_an_abandoned_sync_the_next_one_sends_what_was_trained_since(qwen: Path) -> None:
    import torch

    model = adapted(qwen)
    guard_merges(model)
    next(weights_for_vllm(model))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(3)
    sent = {name: data.clone() for name, data in weights_for_vllm(model)}
    expected = {name: data.clone() for name, data in weights_for_vllm(copy.deepcopy(model))}
    assert differing(expected, sent) == []


def test_nested_merges_come_out_as_the_base(qwen: Path) -> None:
    model = adapted(qwen)
    before = base_state(model)
    guard_merges(model)
    model.merge_adapter()
    merged = base_state(model)
    model.merge_adapter()
    assert differing(merged, base_state(model)) == []
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert differing(before, base_state(model)) == []


def test_a_second_adapter_is_merged_on_top_of_the_first(qwen: Path) -> None:
    from peft import LoraConfig

    found = []
    for guarded in (False, True):
        model = adapted(qwen)
        model.add_adapter("second", LoraConfig(r=4, target_modules=LANGUAGE_QV))
        before = base_state(model)
        if guarded:
            guard_merges(model)
        model.merge_adapter(["default"])
        model.merge_adapter(["second"])
        found.append(base_state(model))
        model.unmerge_adapter()
    assert differing(*found) == []
    assert differing(before, base_state(model)) == []


def test_a_merge_that_fails_leaves_the_base(qwen: Path) -> None:
    import torch

    model = adapted(qwen)
    before = base_state(model)
    guard_merges(model)
    last = [weight for name, weight in model.named_parameters() if "lora_B" in name][-1]
    with torch.no_grad():
        last.fill_(float("nan"))
    if "safe_merge" not in inspect.signature(type(model.base_model).merge_adapter).parameters:
        pytest.skip("this PEFT has no merge of a whole model that checks for NaN")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert differing(before, base_state(model)) == []
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_what_else_changes_the_base_between_merges_stays(qwen: Path) -> None:
    import torch

    model = adapted(qwen)
    guard_merges(model)
    model.merge_adapter()
    model.unmerge_adapter()
    with torch.no_grad():
        weights = [weight for name, weight in model.named_parameters() if "base_layer.weight" in name]
        for weight in weights:
            weight.mul_(2)
    changed = base_state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert differing(changed, base_state(model)) == []


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_variants_and_tied_embeddings_are_kept(qwen: Path, options: dict[str, Any]) -> None:
    model = adapted(qwen, **options)
    before = base_state(model)
    guard_merges(model)
    for _ in range(2):
        model.merge_adapter()
        assert differing(before, base_state(model))
        model.unmerge_adapter()
    assert differing(before, base_state(model)) == []


def test_without_room_the_drift_is_measured_and_reported(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import TrainerCallback

    class Sync(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            for _ in weights_for_vllm(model):
                pass

    monkeypatch.setattr(merge_guard, "free_bytes", lambda device: 0)
    model = adapted(qwen)
    before = base_state(model)
    callback = KVCacheCallback()
    grpo_trainer(model, tmp_path, [callback, Sync()], gradient_checkpointing=False).train()
    after = base_state(model)
    names = [name for name in before if "base_layer.weight" in name]
    changed = sum(float((after[name].float() - before[name].float()).abs().sum()) for name in names)
    measured = changed / sum(float(before[name].float().abs().sum()) for name in names)
    assert measured > 0
    assert f"has drifted by {measured:.2%}" in caplog.text
    assert [failure for failure in callback.failures if "another policy" in failure]


def test_copies_of_the_model_have_guards_of_their_own(qwen: Path) -> None:
    model = adapted(qwen)
    guard_merges(model)
    before = base_state(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.merge_adapter()
        assert differing(before, base_state(other))
        assert differing(before, base_state(model)) == []
        other.unmerge_adapter()
    assert guard_merges(copy.deepcopy(model)) is not guard_merges(model)
    assert guard_merges(load_model(qwen)[0]) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_kept(bits: int, tmp_path: Path) -> None:
    """bitsandbytes quantises the merged weight anew, and that of the unmerged one."""
    pytest.importorskip("bitsandbytes", reason="not installed here; passed with 0.50.2 on a CPU on 2026-11-29")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**options) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    same = []
    for guarded in (False, True):
        model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
        if guarded:
            guard_merges(model)
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            before = model(input_ids=ids).logits
            model.merge_adapter()
            model.unmerge_adapter()
            same.append(model(input_ids=ids).logits.equal(before))
    assert same == [False, True]
