"""Adapters that were trained on a quantised base: exported into the unquantised one, and held against that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import ExportCallback
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.model.load import load_model
from scripts.models.families import build_family
from tests.support.training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = v5_only


def four_bits() -> Any:
    """A quantiser through transformers' public door: linear weights rounded to sixteen levels when they are loaded."""
    from transformers import quantizers
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "sixteen_levels" not in quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING:

        @quantizers.auto.register_quantization_config("sixteen_levels")
        class Config(QuantizationConfigMixin):  # type: ignore[misc]
            """Sixteen levels."""

            def __init__(self, **kwargs: Any) -> None:
                self.quant_method = "sixteen_levels"

        @quantizers.auto.register_quantizer("sixteen_levels")
        class Quantizer(quantizers.HfQuantizer):  # type: ignore[misc]
            """Rounds after loading."""

            requires_calibration = False
            is_trainable = True

            def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
                return False

            def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
                for name, module in model.named_modules():
                    if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                        scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 7
                        module.weight.data = (module.weight.data / scale).round() * scale
                return model

    return quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sixteen_levels"]()


def by_bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("quantised", [four_bits, by_bitsandbytes])
def test_a_quantised_policy_is_served_from_the_unquantised_base(quantised: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    base = build_family("llama", tmp_path / "base", dtype="bfloat16", **sizes)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised(), dtype=torch.bfloat16)
    assert model.hf_quantizer is not None
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    exporting = ExportCallback(tmp_path / "export", strict=True)
    trainer = grpo_trainer(model, tmp_path / "out", [exporting], with_images=False, peft_config=config)
    trainer.train()
    [finding] = exporting.findings
    assert not finding.is_obstacle
    assert f"the export will be its adapter merged into {base}, which is not" in str(finding)
    result = exporting.result
    assert result is not None
    assert result.verification is not None
    logits = next(check.detail for check in result.verification.checks if check.name.startswith("same logits"))
    assert logits.startswith("0 of their spread apart")
    assert float(logits.partition("its adapter not merged, is ")[2].partition(" ")[0]) > 0.1  # refused by this before
    assert "quantization_config" not in open_checkpoint(tmp_path / "export").json("config.json")
    # The same by PEFT: the adapter in the unquantised base, merged in float32 and rounded once.
    trainer.model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = load_model(tmp_path / "export")[0].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16), rtol=0.01, atol=1e-6)
