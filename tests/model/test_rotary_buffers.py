"""Rotary frequencies that were rounded while a model was loaded or cast: other positions than its files'."""

from __future__ import annotations

import json
import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import TrainerState

from grpo_toolkit import ExportCallback, KVCacheCallback
from grpo_toolkit.model.generation.chat_inputs import inputs_for, prepare_inputs
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import dtype_argument, load_model
from grpo_toolkit.model.rotary_buffers import restore_buffers, rounded_buffers
from scripts.benchmarks.ports import free_port
from tests.support.training import grpo_trainer, nested_config_only
from tests.support.warm import run_python

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

POSITIONS = ["model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"]
# What ZeRO-3 rounds: before transformers 5 the language model counts in integers, which stay.
ROUNDED = POSITIONS if Version(transformers.__version__) >= Version("5.0") else POSITIONS[1:]


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma_config() -> Any:
    return transformers.Gemma3TextConfig(vocab_size=64, num_key_value_heads=1, head_dim=16, **SIZES)


def logits(model: Any, processor: Any, request: Request) -> torch.Tensor:
    """Return the logits of the token after a long prompt."""
    long = Request(messages=[{"role": "user", "content": "What is this? " * 60}], images=request.images)
    with torch.no_grad():
        return model(**inputs_for(model, prepare_inputs(processor, [long]))).logits[0, -1].float()


@nested_config_only
def test_a_cast_rounds_the_positions_and_they_are_computed_again(base: Path, image_request: Request) -> None:
    model, processor, _ = load_model(base)
    assert rounded_buffers(model) == []
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    right = logits(model, processor, image_request)

    model.to(torch.bfloat16)  # its weights are in bfloat16 already
    assert set(POSITIONS) <= set(rounded_buffers(model))
    worst = max(float((model.get_buffer(name).float() / frequencies[name] - 1).abs().max()) for name in POSITIONS)
    assert 1e-3 < worst < 4e-3  # a bfloat16 keeps eight bits
    assert not logits(model, processor, image_request).equal(right)

    assert set(POSITIONS) <= set(restore_buffers(model))
    assert all(buffer.equal(frequencies[name]) for name, buffer in model.named_buffers())
    assert logits(model, processor, image_request).equal(right)
    assert restore_buffers(model) == []


@nested_config_only
def test_what_a_load_in_half_precision_makes_so_stays(tmp_path: Path) -> None:
    """Gemma's scale of its embeddings has the dtype of the load, and so has the export's."""
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

    Gemma3ForCausalLM(gemma_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **{dtype_argument(): torch.bfloat16})
    scale = "model.embed_tokens.embed_scale"
    assert rounded_buffers(model) == [scale]
    assert restore_buffers(model) == []
    assert model.get_buffer(scale).dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert scale not in restore_buffers(model)
    assert rounded_buffers(model) == [scale]


SHARED_OUT = """
import json, sys
import deepspeed, transformers
from grpo_toolkit.model.rotary_buffers import restore_buffers, rounded_buffers
from grpo_toolkit.model.load import load_model
from pathlib import Path
from transformers.integrations import HfDeepSpeedConfig

plain, _, _ = load_model(Path(sys.argv[1]))
deepspeed.init_distributed("gloo")
settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
reference = HfDeepSpeedConfig(settings)
found = {}
loaded, _, _ = load_model(Path(sys.argv[1]))
with deepspeed.zero.Init(config_dict_or_path=settings):
    built = type(plain)(plain.config)
for name, model in {"loaded": loaded, "built": built}.items():
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    rounded = rounded_buffers(model)
    restored = restore_buffers(model)
    equal = all(one.equal(other) for one, other in zip(plain.buffers(), model.buffers(), strict=True))
    found[name] = {"rounded": rounded, "restored": restored, "equal": equal}
print(json.dumps(found))
"""


@nested_config_only
def test_what_zero3_rounds_as_it_shares_a_model_out_is_computed_again(base: Path) -> None:
    pytest.importorskip("deepspeed", reason="the newest stack alone installs DeepSpeed")
    here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    done = run_python(["-c", SHARED_OUT, base], env=os.environ | here | {"MASTER_PORT": str(free_port())})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(ROUNDED) <= set(found["built"]["rounded"])
    # 5.23 computes them again after loading; 5.17 to 5.22 leave both rounded, 4.57 the vision tower's.
    if Version(transformers.__version__) >= Version("5.23"):
        assert found["loaded"]["rounded"] == []
    for kind in ("loaded", "built"):
        assert found[kind]["restored"] == found[kind]["rounded"]
        assert found[kind]["equal"]


TRAINED_SHARED_OUT = """
import json, sys
from pathlib import Path
import deepspeed
from grpo_toolkit import KVCacheCallback
from grpo_toolkit.model.rotary_buffers import rounded_buffers
from grpo_toolkit.model.load import load_model
from transformers import TrainerCallback
from tests.support.training import grpo_trainer

base, out = map(Path, sys.argv[1:])
plain, processor, _ = load_model(base)
settings = {
    "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
}

class Look(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        found["in_training"] = rounded_buffers(model)

deepspeed.init_distributed("gloo")
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = type(plain)(plain.config)
found = {"built": rounded_buffers(model)}
callback = KVCacheCallback(strict=True)
options = {"deepspeed": settings, "bf16": True, "max_steps": 1, "processing_class": processor}
trainer = grpo_trainer(model, out, [callback, Look()], **options)
trainer.train()
found["zero_stage"] = trainer.accelerator.state.deepspeed_plugin.zero_stage
found["shards"] = hasattr(next(trainer.model.parameters()), "ds_id")
found["failures"] = callback.failures
print(json.dumps(found))
"""


@nested_config_only
def test_the_cache_callback_alone_trains_with_the_positions_that_its_files_will_have(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="the newest stack alone installs DeepSpeed")
    here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    here |= {"MASTER_PORT": str(free_port())}
    done = run_python(["-c", TRAINED_SHARED_OUT, base, tmp_path / "out"], env=os.environ | here)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(ROUNDED) <= set(found["built"])
    assert (found["in_training"], found["failures"]) == ([], [])
    assert (found["zero_stage"], found["shards"]) == (3, True)
    assert done.stderr.count("had been rounded to half precision while the model was loaded; they are computed") == 1


@pytest.fixture
def cast(base: Path) -> tuple[Any, Any]:
    """A model whose positions a cast has rounded, and its processor."""
    model, processor, _ = load_model(base)
    return model.to(torch.bfloat16), processor


@nested_config_only
def test_a_training_begins_with_the_positions_of_its_export(
    cast: tuple[Any, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = cast
    export = ExportCallback(tmp_path / "export", base=base, num_prompts=1, strict=True)
    trainer = grpo_trainer(model, tmp_path / "out", [export], processing_class=processor, max_steps=1)
    assert set(POSITIONS) <= set(rounded_buffers(model))
    trainer.train()
    assert rounded_buffers(model) == []
    assert export.result is not None
    assert export.result.verification is not None
    assert export.result.verification.passed
    assert "had been rounded to half precision while the model was loaded; they are computed anew" in caplog.text


@nested_config_only
def test_rollouts_that_round_at_every_step_are_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor, _ = load_model(base)
    export = ExportCallback(tmp_path / "export", base=base, num_prompts=1)
    trainer = grpo_trainer(model, tmp_path / "out", [], processing_class=processor)
    trainer.args.use_transformers_continuous_batching, trainer.args.bf16 = True, True
    with caplog.at_level(logging.WARNING):
        export.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert "use_transformers_continuous_batching=False" in caplog.text
    assert export.failures == []


@nested_config_only
def test_with_a_reference_model_the_rounding_is_said_and_left(
    cast: tuple[Any, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = cast
    export = ExportCallback(tmp_path / "export", base=base, num_prompts=1)
    trainer = grpo_trainer(model, tmp_path / "out", [], processing_class=processor, beta=0.1, max_steps=1)
    assert trainer.ref_model is not None
    with caplog.at_level(logging.WARNING):
        for callback in (KVCacheCallback(), export):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert set(POSITIONS) <= set(rounded_buffers(model))
    assert caplog.text.count("zero3_init_flag: false") == 1  # by whichever callback comes first
    assert export.failures == []
    another = TrainerState()
    export.on_train_begin(trainer.args, another, trainer.control, model=model)
    assert caplog.text.count("zero3_init_flag: false") == 2  # another training is told again


@nested_config_only
def test_who_keeps_weights_in_float32_keeps_what_the_load_made(tmp_path: Path) -> None:
    """`prepare_model_for_kbit_training` casts weights alone; the export's scale is in the dtype of the load."""
    model = transformers.Gemma3ForCausalLM(gemma_config()).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert model.dtype == torch.float32
    assert "model.embed_tokens.embed_scale" not in restore_buffers(model)
    assert model.model.embed_tokens.embed_scale.dtype == torch.bfloat16


@nested_config_only
def test_to_compute_them_again_draws_no_random_numbers() -> None:
    """LLaVA's tower draws its class embedding while it is built."""
    tower = transformers.CLIPVisionConfig(image_size=28, patch_size=14, **SIZES)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=64, **SIZES), vision_config=tower
    )
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    before = torch.get_rng_state()
    assert "model.language_model.rotary_emb.inv_freq" in restore_buffers(model)
    assert torch.get_rng_state().equal(before)
    assert torch.get_default_dtype() == torch.float32


@nested_config_only
def test_a_class_that_is_not_built_from_its_config_is_trained_and_exported(
    cast: tuple[Any, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = cast

    def build(self: Any, config: Any, head: str) -> None: ...

    model.__class__ = type(type(model).__name__, (type(model),), {"__init__": build})
    export = ExportCallback(tmp_path / "export", base=base, num_prompts=1)
    callbacks = [KVCacheCallback(), export]
    grpo_trainer(model, tmp_path / "out", callbacks, processing_class=processor, max_steps=1).train()
    assert caplog.text.count("computing the rotary positions again failed: TypeError") == 1
    assert export.failures == []
    assert export.result is not None


@nested_config_only
def test_what_the_class_makes_so_is_no_rounding_beside_a_reference_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = transformers.Gemma3ForCausalLM(gemma_config())
    model.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.to(torch.bfloat16)
    assert rounded_buffers(model) == ["model.embed_tokens.embed_scale"]
    export = ExportCallback(tmp_path / "export")
    export.on_train_begin(SimpleNamespace(beta=0.1), TrainerState(), None, model=model)
    assert "rounded" not in caplog.text


@nested_config_only
def test_frequencies_that_grow_with_the_text_begin_anew() -> None:
    """A text that was read before (a baseline on long prompts) is forgotten, as the export has not read it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": "dynamic", "factor": 2.0}
    newer = hasattr(LlamaConfig(), "rope_parameters")
    rope = {"rope_parameters": scaling | {"rope_theta": 1e4}} if newer else {"rope_scaling": scaling}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **SIZES, **rope))
    texts = [torch.arange(length)[None] % 64 for length in (200, 100)]
    found = []
    for read in ([], [texts[0]]):
        with torch.no_grad():
            for text in read:
                model(text)
            model.to(torch.bfloat16)
            assert restore_buffers(model)
            model(texts[1])
        found.append(model.model.rotary_emb.inv_freq.clone())
    assert found[0].equal(found[1])
