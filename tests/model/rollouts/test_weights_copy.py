"""The copy of the weights for rollouts: cast, folded, shared, tied, and refreshed where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.errors import UnsupportedError
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.rollouts.rollout_size import rollout_size
from grpo_toolkit.model.rollouts.weights_copy import WeightsCopy, drops_out, is_switched_off, why_no_copy
from tests.support.training import LANGUAGE_QV

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)


def tied_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(model: Any, **changes: Any) -> Any:
    """Return the model with an adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_QV, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(settings | changes)))


def live(model: Any) -> Any:
    return model.get_base_model()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def test_what_needs_no_casting_is_shared() -> None:
    model = tied_llama()
    copy = WeightsCopy(model, dtype=None)
    copy.refresh()
    here, there = dict(model.named_parameters()), dict(copy.model.named_parameters())
    assert here.keys() == there.keys()
    assert all(here[name].data_ptr() == there[name].data_ptr() for name in here)
    assert not any(parameter.requires_grad for parameter in there.values())
    assert torch.equal(logits(copy.model), logits(model.eval()))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.equal(logits(copy.model), logits(model))
    assert rollout_size(model).copied_bytes(weight_bytes=4) == 0


def test_float32_is_cast_once_and_ties_are_tied_again() -> None:
    model = tied_llama()
    copy = WeightsCopy(model, dtype=torch.bfloat16)
    copy.refresh()
    tensors = dict(copy.model.named_parameters())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert copy.model.lm_head.weight is copy.model.model.embed_tokens.weight
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight.bfloat16())
    # Rotary frequencies are no weights: `to_empty` would leave noise, and bfloat16 other positions.
    assert torch.equal(copy.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert rollout_size(model).copied_bytes(weight_bytes=4, computed_bytes=2) == sum(
        2 * tensor.numel() for tensor in tensors.values()
    )
    assert model.model.norm.weight.dtype == torch.float32


def test_it_is_refreshed_in_place_and_only_when_weights_were_written_to() -> None:
    model = tied_llama()
    copy = WeightsCopy(model, dtype=torch.bfloat16)
    copy.refresh()
    where = {name: tensor.data_ptr() for name, tensor in copy.model.named_parameters()}
    copy.refresh(is_dirty=False)
    assert copy.refreshed == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    copy.refresh(is_dirty=False)
    assert copy.refreshed == 2
    assert all(
        torch.equal(there, here.bfloat16())
        for here, there in zip(model.parameters(), copy.model.parameters(), strict=True)
    )
    model.load_state_dict(tied_llama().state_dict())  # as a checkpoint is loaded
    copy.refresh(is_dirty=False)
    model.model.norm.weight.data.fill_(3)  # which torch does not count: whoever does this says so
    copy.refresh(is_dirty=True)
    assert copy.refreshed == 4
    assert torch.equal(copy.model.model.norm.weight, torch.full((32,), 3, dtype=torch.bfloat16))
    assert where == {name: tensor.data_ptr() for name, tensor in copy.model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_is_folded_into_the_copy_and_not_into_the_base(qwen: Path, changes: dict[str, Any]) -> None:
    model = adapted(load_model(qwen)[0], **changes).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = WeightsCopy(live(model), dtype=None)
    copy.refresh()
    assert (logits(copy.model) - logits(model)).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(copy.model) - logits(model)).abs().max() > 0.1
        assert is_switched_off(live(model))
    assert not is_switched_off(live(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    folded = [name for name, _ in copy.model.named_parameters() if name.endswith(("q_proj.weight", "v_proj.weight"))]
    here, there = {tensor.data_ptr() for tensor in model.parameters()}, dict(copy.model.named_parameters())
    shared = [name for name in there if there[name].data_ptr() in here]
    assert len(shared) == len(there) - len(folded)
    assert rollout_size(model).copied_bytes(weight_bytes=4) == sum(4 * there[name].numel() for name in folded)


def test_a_fold_is_float32_arithmetic_with_one_rounding(qwen: Path) -> None:
    model = adapted(load_model(qwen)[0].to(torch.bfloat16))
    copy = WeightsCopy(live(model), dtype=None)
    copy.refresh()
    layer = next(module for name, module in live(model).named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = (layer.base_layer.weight.float() + 2.0 * (up.float() @ down.float())).bfloat16()
    found = next(t for name, t in copy.model.named_parameters() if name.endswith("layers.0.self_attn.q_proj.weight"))
    assert torch.equal(found, wanted)
    with torch.no_grad():
        up.mul_(-1)
    where = found.data_ptr()
    copy.refresh(is_dirty=False)
    assert torch.equal(found, (layer.base_layer.weight.float() - 2.0 * (-up.float() @ down.float())).bfloat16())
    assert found.data_ptr() == where


def test_another_adapter_takes_the_firsts_place(qwen: Path) -> None:
    from peft import LoraConfig

    model = adapted(load_model(qwen)[0]).eval()
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=LANGUAGE_QV, init_lora_weights=False)
    model.add_adapter("second", settings)
    copy = WeightsCopy(live(model), dtype=None)
    copy.refresh()
    model.set_adapter("second")
    copy.refresh(is_dirty=False)
    assert (logits(copy.model) - logits(model)).abs().max() < 1e-5
    model.merge_adapter()
    copy.refresh(is_dirty=False)
    assert (logits(copy.model) - logits(model)).abs().max() < 1e-5


def test_what_cannot_be_folded_is_named(qwen: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = load_model(qwen)[0]
    assert why_no_copy(model) is None
    assert drops_out(adapted(model, lora_dropout=0.1))
    model = load_model(qwen)[0]
    assert why_no_copy(adapted(model, use_dora=True)) == "the adapter has a layer.Linear layer"
    model = load_model(qwen)[0]
    embedding = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert why_no_copy(embedding) == "the adapter has a layer.Embedding layer"
    model = load_model(qwen)[0]
    tokens = get_peft_model(model, LoraConfig(r=2, target_modules=LANGUAGE_QV, trainable_token_indices=[1, 2]))
    assert why_no_copy(tokens) == "the adapter has a TrainableTokensWrapper"
    prompt = get_peft_model(tied_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert why_no_copy(prompt) == "the adapter is made of virtual tokens"


def test_a_model_that_is_not_what_its_config_says_is_refused() -> None:
    model = tied_llama()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(UnsupportedError, match=r"has another model\.layers\.0\.mlp\.up_proj\.weight"):
        WeightsCopy(model, dtype=None)
