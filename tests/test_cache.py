"""The KV cache of live models: the faults as they happen, and the cures."""

from __future__ import annotations

import copy
import inspect
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit.cache import (
    CacheProbe,
    base_model,
    cache_flags,
    config_levels,
    disable_cache_for_training,
    enable_cache_for_generation,
    inference_ready,
    is_sharded,
    leave_training,
    set_cache_flags,
    vision_tower,
)
from grpo_toolkit.callbacks import KVCacheCallback
from grpo_toolkit.inference import generate, load_model
from training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.inference import Request


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


def test_after_training_a_plain_trainer_leaves_a_model_that_talks_nonsense_and_ours_does_not(
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
    assert texts == {"plain": (False, False), "ours": (True, True)}
