"""The KV cache of live models: the faults as they happen, and the cures."""

from __future__ import annotations

import copy
import inspect
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit.callbacks import KVCacheCallback
from grpo_toolkit.model.attention.decode_without_cudnn import DecodeWithoutCudnn
from grpo_toolkit.model.cache_probe import CacheProbe, Decoding, RolloutWatch, vision_tower
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import plain_request
from grpo_toolkit.model.kv_cache import (
    cache_flags,
    disable_cache_for_training,
    enable_cache_for_generation,
    inference_ready,
    leave_training,
    set_cache_flags,
)
from grpo_toolkit.model.live_model import base_model, config_levels
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.sharding.gather import is_sharded
from scripts.models.families import build_family
from tests.support.training import FORGETS_IN_TRAINING, forgets_in_training, grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.generation.request import Request

pytestmark = pytest.mark.stack


@pytest.fixture
def model(qwen: Path) -> Any:
    return load_model(qwen)[0]


@pytest.fixture
def processor(qwen: Path) -> Any:
    return load_model(qwen)[1]


def test_step_lengths_prove_the_cache(model: Any, processor: Any, image_request: Request) -> None:
    record = generate(model, processor, image_request)
    prompt = record.prompt_tokens
    assert record.step_lengths == [prompt, *[1] * (len(record.tokens) - 1)]
    assert record.is_cached
    assert record.vision_calls == 1


def test_without_a_cache_every_step_recomputes_the_prompt(model: Any, processor: Any, image_request: Request) -> None:
    cached = generate(model, processor, image_request)
    model.generation_config.use_cache = False
    record = generate(model, processor, image_request)
    steps = len(record.tokens)
    assert record.step_lengths == [record.prompt_tokens + step for step in range(steps)]
    assert not record.is_cached
    # transformers 5.x encodes images ahead of the prefill, once; before that the tower ran at every step.
    encodes_ahead = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    assert record.vision_calls == (1 if encodes_ahead else steps)
    assert record.tokens == cached.tokens


@forgets_in_training
def test_in_train_mode_with_checkpointing_the_text_is_wrong_and_inference_ready_cures_it(
    model: Any, processor: Any, image_request: Request
) -> None:
    expected = generate(model, processor, image_request).tokens
    model.train()
    model.gradient_checkpointing_enable()
    broken = generate(model, processor, image_request)
    assert broken.step_lengths[1:] == [1] * (len(broken.tokens) - 1)  # one token a step, as if there were a cache
    assert not broken.is_cached  # but the checkpointed layers threw it away
    assert broken.tokens != expected
    with inference_ready(model):
        cured = generate(model, processor, image_request)
    assert cured.is_cached
    assert cured.tokens == expected


def snapshot(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "checkpointing": [vars(m).get("gradient_checkpointing") for m in model.modules()],
        "function": [vars(m).get("_gradient_checkpointing_func") for m in model.modules()],
        "flags": cache_flags(base_model(model).config),
        "generation": copy.deepcopy(vars(base_model(model).generation_config)),
        "python": random.getstate(),
        "torch": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_inference_ready_restores_everything_also_after_an_exception(model: Any, fails: bool) -> None:
    model.train()
    vision_tower(model).eval()  # a mixed state: restoring module by module, not with one train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.config.use_cache = False
    model.generation_config.use_cache = False
    before = snapshot(model)

    def look_inside() -> None:
        with inference_ready(model) as ready:
            assert ready is model
            assert not any(module.training for module in model.modules())
            assert not any(vars(m).get("gradient_checkpointing") for m in model.modules())
            assert model.generation_config.use_cache is True
            assert set(cache_flags(model.config).values()) == {True}
            torch.rand(3)
            random.random()
            if fails:
                raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            look_inside()
    else:
        look_inside()
    assert snapshot(model) == before


@v5_only
def test_flags_keep_absent_null_and_false_apart(model: Any) -> None:
    levels = [level for level, _ in config_levels(model.config)]
    assert levels[0] == ()
    assert ("vision_config",) in levels
    original = cache_flags(model.config)
    assert () not in original  # Qwen2.5-VL's own config has no use_cache at the top
    model.config.use_cache = None
    assert cache_flags(model.config)[()] is None
    set_cache_flags(model.config, original)
    assert cache_flags(model.config) == original
    assert "use_cache" not in vars(model.config)


@v5_only
def test_training_switches_off_every_level_that_has_the_key(model: Any) -> None:
    model.config.use_cache = True
    disable_cache_for_training(model)
    assert set(cache_flags(model.config).values()) == {False}
    assert () in cache_flags(model.config)
    assert ("vision_config",) not in cache_flags(model.config)


def test_enabling_generation_says_whether_the_base_was_poisoned(model: Any) -> None:
    assert enable_cache_for_generation(model) is False
    model.generation_config.use_cache = False
    assert enable_cache_for_generation(model) is True
    assert model.generation_config.use_cache is True


def test_wrappers_are_seen_through(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    assert base_model(model) is model
    assert base_model(torch.nn.DataParallel(model)) is model
    assert base_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model
    with pytest.raises(TypeError, match="holds no transformers model"):
        base_model(torch.nn.Linear(1, 1))


def test_every_way_of_sharding_is_recognised(model: Any) -> None:
    assert not is_sharded(model)

    class FullyShardedDataParallel(torch.nn.Module):  # FSDP1 is told by its class, so that torch need not be asked
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    assert is_sharded(FullyShardedDataParallel(model))
    next(iter(model.parameters())).ds_id = 0  # DeepSpeed ZeRO-3
    assert is_sharded(model)


def test_leaving_training_is_leaving_both_switches(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    leave_training(model)
    assert not model.training
    assert not any(vars(m).get("gradient_checkpointing") for m in model.modules())


def test_families_decode_with_a_cache(any_base: Path, image_request: Request) -> None:
    model, processor, report = load_model(any_base)
    assert report.is_clean
    request = image_request if vision_tower(model) is not None else plain(image_request)
    record = generate(model, processor, request)
    assert record.is_cached
    assert record.vision_calls == (0 if vision_tower(model) is None else 1)


def plain(request: Request) -> Request:
    from dataclasses import replace

    return replace(request, images=[])


def test_after_training_ours_talks_sense_also_where_a_plain_trainers_model_talks_nonsense(
    qwen: Path, tmp_path: Path, image_request: Request
) -> None:
    texts = {}
    for name, callbacks in (("plain", []), ("ours", [KVCacheCallback(strict=True)])):
        trainer = grpo_trainer(qwen, tmp_path / name, callbacks)
        trainer.train()
        with CacheProbe(trainer.model) as probe:
            record = generate(trainer.model, trainer.processing_class, image_request)
        with inference_ready(trainer.model):
            right = generate(trainer.model, trainer.processing_class, image_request)
        texts[name] = (record.tokens == right.tokens, probe.is_cached)
    sane = not FORGETS_IN_TRAINING
    assert texts == {"plain": (sane, sane), "ours": (True, True)}


def watched_generation(model: Any, processor: Any, request: Request, **settings: Any) -> Decoding | None:
    watch = RolloutWatch(model)
    with torch.no_grad():
        model.generate(**prepare_inputs(processor, [request]), max_new_tokens=4, do_sample=False, **settings)
    watch.close()
    return watch.seen


def test_a_watch_tells_how_a_rollout_decodes(model: Any, processor: Any, image_request: Request) -> None:
    assert watched_generation(model, processor, image_request) is Decoding.CACHED
    assert watched_generation(model, processor, image_request, use_cache=False) is Decoding.RECOMPUTED


@forgets_in_training
def test_a_watch_sees_a_cache_that_holds_nothing(model: Any, processor: Any, image_request: Request) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    assert watched_generation(model, processor, image_request) is Decoding.FORGETFUL


@v5_only
@pytest.mark.parametrize("family", ["minimax", "jamba", "qwen3_next"])
def test_a_hybrid_cache_is_seen_by_the_layers_that_hold_tokens(family: str, tmp_path: Path) -> None:
    """Of MiniMax's the first layer is linear, and holds none: transformers calls the cache empty."""
    model, tokenizer, _ = load_model(build_family(family, tmp_path / "base"))
    record = generate(model, tokenizer, plain_request())
    assert record.step_lengths[1:] == [1] * (len(record.tokens) - 1)
    assert record.is_cached
    assert watched_generation(model, tokenizer, plain_request()) is Decoding.CACHED


@v5_only
def test_a_cache_of_linear_layers_alone_has_no_length(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, **sizes)).eval()
    with torch.no_grad(), CacheProbe(model) as probe:
        model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False)
    assert probe.step_lengths == [6, 1, 1, 1]
    assert probe.is_cached is None
    assert "proving the KV cache" not in caplog.text


def test_a_watch_takes_no_training_forward_for_a_rollout(model: Any) -> None:
    watch = RolloutWatch(model)
    tokens = torch.arange(12).reshape(2, 6)
    for length in (4, 5, 6):
        model(input_ids=tokens[:, :length])  # gradients are wanted
    with torch.no_grad():
        for length in (4, 6, 5):  # log-probabilities of batches of other lengths
            model(input_ids=tokens[:, :length])
        model(input_ids=tokens[:, :6].flip(0))
    assert watch.seen is None
    watch.close()


def test_the_first_rollout_is_watched_and_one_without_a_cache_is_said(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = KVCacheCallback(strict=True)
    trainer = grpo_trainer(qwen, tmp_path / "cached", [callback], max_steps=1)
    hooks = len(trainer.model._forward_pre_hooks)
    trainer.train()
    assert callback.decoding is Decoding.CACHED
    assert "the first rollout decoded" not in caplog.text
    trainer = grpo_trainer(qwen, tmp_path / "not", [callback], max_steps=1, generation_kwargs={"use_cache": False})
    trainer.train()
    assert callback.decoding is Decoding.RECOMPUTED
    assert "the first rollout decoded without a KV cache" in caplog.text
    assert len(trainer.model._forward_pre_hooks) == hooks  # nothing of us is left on the model


def test_decode_steps_alone_are_kept_off_cudnn(model: Any, processor: Any, image_request: Request) -> None:
    seen: list[tuple[int, bool]] = []
    attention = model.get_decoder().layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["hidden_states"].shape[1], torch.backends.cuda.cudnn_sdp_enabled())
        ),
        with_kwargs=True,
    )
    guard = DecodeWithoutCudnn(model)
    generate(model, processor, image_request)
    model(input_ids=torch.arange(6)[None])
    model(input_ids=torch.arange(1)[None])  # one token, but of a training forward
    guard.close()
    lengths = [length for length, _ in seen]
    assert [enabled for _, enabled in seen] == [True, *[False] * 7, True, True]
    assert lengths[1:] == [*[1] * 7, 6, 1]

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    attention.register_forward_pre_hook(out_of_memory)
    guard = DecodeWithoutCudnn(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=torch.arange(1)[None])
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", ["compiled", "data parallel", "PEFT"])
def test_inference_ready_sees_through_wrappers(kind: str, model: Any, processor: Any, image_request: Request) -> None:
    from peft import LoraConfig, get_peft_model

    expected = generate(model, processor, image_request).tokens
    model.train()
    model.gradient_checkpointing_enable()
    wrap = {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "data parallel": lambda: torch.nn.DataParallel(model),
        "PEFT": lambda: get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)).train(),
    }
    wrapped = wrap[kind]()
    before = snapshot(wrapped)
    with inference_ready(wrapped):
        assert generate(base_model(wrapped), processor, image_request).tokens == expected
    assert snapshot(wrapped) == before
