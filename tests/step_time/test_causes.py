"""Causes of slow steps, each seeded in a real training of a tiny model: it is found, nothing else is, and it is first.

The clean training is one where nothing is to be found: every cause of a plain GRPO step of a vision-language model is
cured or not there. A seed puts one back.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import FastRolloutCallback, PackedVisionCallback, StepTimeCallback
from grpo_toolkit.step_time.causes.cause import Mean
from grpo_toolkit.step_time.causes.table import BY_NAME, CAUSES
from grpo_toolkit.step_time.explain import find_causes
from grpo_toolkit.step_time.seams.attention_calls import calls_when_packed
from grpo_toolkit.step_time.seen import KernelsSeen, RolloutSeen, Seen, Settings, VisionSeen
from grpo_toolkit.step_time.work import Machine
from tests.support.models import build_llama
from tests.support.training import LANGUAGE_QV, grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("bases") / "llama")


def seen_in(base: Path, folder: Path, callbacks: list[Any], **options: Any) -> Seen:
    """Train two steps, and return what was seen of the second."""
    callback = StepTimeCallback(strict=True, floors=False)
    trainer = grpo_trainer(base, folder, [*callbacks, callback], **options)
    callback.trainer = trainer
    trainer.train()
    assert callback._seen is not None
    return callback._seen


WALL = 100.0
MEAN = Mean(
    wall_s=WALL,
    phases_s={
        "reading_rows": 2.0,
        "image_processing": 4.0,
        "rollout": 30.0,
        "rewards": 2.0,
        "forward": 20.0,
        "backward": 38.0,
        "optimizer": 2.0,
        "saving": 1.0,
        "other": 1.0,
    },
    parts_s={
        "rollout/prefill": 10.0,
        "rollout/decode": 20.0,
        "rollout/prefill/vision": 4.0,
        "forward/vision": 10.0,
        "rewards/slow": 2.0,
    },
    floors_s={"rollout/prefill": 0.5, "rollout/decode": 2.0, "forward": 2.0, "backward": 6.0, "optimizer": 0.5},
    decode_steps=100.0,
    rollouts=1.0,
    machine=Machine(flops_per_s=1e12, bandwidth_bytes_per_s=1e11),
)
"""A step whose seconds are given, so that no clock decides what is found."""

CLEAN = Seen(
    rollout=RolloutSeen(
        engine="fast",
        rows=8,
        distinct=2,
        prefilled=2,
        padding=0.1,
        is_cached=True,
        lengths=((8, 8, 7, 8, 6, 8, 8, 7),),
        cap=8,
    ),
    vision=VisionSeen(images=2, distinct=2, attention_calls=2, attention_layers=2, is_frozen=True),
    settings=Settings(
        accumulation=2,
        batch_size=4,
        workers=2,
        is_checkpointing=True,
        activations_bytes=5e9,
        peak_bytes=70_000_000_000,
        total_bytes=80_000_000_000,
    ),
    padding=0.1,
    processed=2,
    processed_distinct=2,
    rewards_cpu={"slow": 1.0},
    is_gpu=True,
)


def names(seen: Seen, mean: Mean = MEAN) -> list[str]:
    return [one.cause for one in find_causes(seen, mean)]


def rollout(**changes: Any) -> dict[str, Any]:
    return {"rollout": replace(CLEAN.rollout, **changes)}  # type: ignore[type-var]


def vision(**changes: Any) -> dict[str, Any]:
    return {"vision": replace(CLEAN.vision, **changes)}  # type: ignore[type-var]


def settings(**changes: Any) -> dict[str, Any]:
    return {"settings": replace(CLEAN.settings, **changes)}


BUSY_GPU = KernelsSeen(products=0.8, attention=0.15, between=0.05)

SEEDS: dict[str, dict[str, Any]] = {
    "cacheless-rollout": rollout(engine="generate", is_cached=False),
    "attention-by-window": vision(attention_calls=506),
    "images-encoded-again": vision(images=8, distinct=1),
    "frozen-tower-backpropagated": vision(wants_gradient=True),
    "prompts-prefilled-again": rollout(prefilled=8),
    "weights-cast-each-step": rollout(cast_bytes=12_000_000_000),
    "attention-planned-anew": rollout(is_planned_anew=True),
    "decode-launched-by-kernel": rollout(engine="generate"),
    "longest-answers-tail": rollout(lengths=((100, 9, 8, 7, 9, 8, 7, 9),)),
    "rollout-padding": rollout(padding=0.5),
    "padding": {"padding": 0.5},
    "images-processed-again": {"processed": 128},
    "rewards-one-by-one": {},
    "logits-of-the-vocabulary": {"logits_bytes": 20 << 30},
    "checkpointing-with-free-memory": settings(peak_bytes=20_000_000_000, activations_bytes=3e10, accumulation=1),
    "small-micro-batches": settings(peak_bytes=20_000_000_000, is_checkpointing=False, activations_bytes=1e10),
    "ranks-wait": {},
    "saves-block": {},
    "rows-read-in-line": settings(workers=0),
    "passes-launched-by-kernel": {"kernels": KernelsSeen(products=0.4, attention=0.1, between=0.0, idle=0.5)},
    "kernels-between-products": {"kernels": KernelsSeen(products=0.5, attention=0.1, between=0.4)},
    "inputs-prepared-in-line": {"kernels": BUSY_GPU},
    "decoding-below-bandwidth": {"kernels": BUSY_GPU},
    "passes-below-peak": {"kernels": BUSY_GPU},
}


def floors(**seconds: float) -> Mean:
    """Return the step in which the GPU computes as fast as physics lets it, but for some phases."""
    at_floor = {"rollout/prefill": 10.0, "rollout/decode": 20.0, "forward": 20.0, "backward": 38.0}
    return replace(MEAN, floors_s=at_floor | seconds)


MEANS: dict[str, Mean] = {
    "passes-launched-by-kernel": floors(forward=10.0, backward=19.0),
    "kernels-between-products": floors(forward=14.0, backward=26.6),
    "inputs-prepared-in-line": replace(floors(), phases_s=MEAN.phases_s | {"texts": 7.0, "preparing": 3.0}),
    "decoding-below-bandwidth": floors(**{"rollout/decode": 8.0}),
    "passes-below-peak": floors(forward=10.0, backward=30.0),
    "rewards-one-by-one": replace(
        MEAN, parts_s=MEAN.parts_s | {"rewards/slow": 9.0}, phases_s=MEAN.phases_s | {"rewards": 9.0}
    ),
    "saves-block": replace(MEAN, phases_s=MEAN.phases_s | {"saving": 12.0}),
    "rows-read-in-line": replace(MEAN, phases_s=MEAN.phases_s | {"reading_rows": 20.0}),
    "ranks-wait": replace(
        MEAN, busy_s={0: 10.0, 1: 10.5, 2: 30.0}, phases_s=MEAN.phases_s | {"waiting_for_ranks": 20.0}
    ),
}


def test_every_cause_has_a_seed() -> None:
    assert set(SEEDS) == {cause.name for cause in CAUSES} == set(BY_NAME)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert names(CLEAN) == []
    assert names(Seen()) == []


def test_a_callback_that_is_in_place_is_not_advised_again() -> None:
    windows = replace(CLEAN, **SEEDS["attention-by-window"])
    (found,) = find_causes(windows, MEANS.get("attention-by-window", MEAN), in_place={"PackedVisionCallback"})
    assert found.line == ""
    assert found.cure == "none here: PackedVisionCallback is in place, and leaves this as it is on this machine"


def test_on_a_cpu_windows_that_would_go_one_by_one_still_are_no_cause() -> None:
    uneven = [4, 4, 2, 4, 4, 2, 10]  # two layers of windows, one that attends to a whole image
    assert calls_when_packed(uneven, layers=3, device="cpu") == 7
    assert calls_when_packed(uneven, layers=3, device="cuda") == 3
    assert calls_when_packed([4, 4, 4, 4, 8], layers=3, device="cpu") == 3
    looped = vision(attention_calls=7, attention_layers=3, packed_calls=7)
    assert names(replace(CLEAN, is_gpu=False, **looped)) == []
    assert names(replace(CLEAN, **vision(attention_calls=7, attention_layers=3))) == ["attention-by-window"]


@pytest.mark.parametrize("name", SEEDS)
def test_a_cause_is_found_alone(name: str) -> None:
    mean = MEANS.get(name, MEAN)
    found = find_causes(replace(CLEAN, **SEEDS[name]), mean)
    assert [one.cause for one in found] == [name]
    assert found[0].saving_s is not None
    assert 0 < found[0].saving_s < WALL
    assert found[0].evidence
    assert found[0].cure
    assert found[0].link


def test_with_a_profile_no_second_of_what_a_gpu_computes_is_unexplained() -> None:
    seen = replace(CLEAN, kernels=KernelsSeen(products=0.4, attention=0.1, between=0.3, idle=0.2))
    found = {one.cause: one for one in find_causes(seen, MEAN)}
    assert set(found) == {
        "passes-launched-by-kernel", "kernels-between-products", "passes-below-peak", "decoding-below-bandwidth"
    }  # fmt: skip
    for name in ("rollout/prefill", "rollout/decode", "forward", "backward"):
        explained = sum(one.savings_s.get(name, 0.0) for one in found.values())
        assert explained == pytest.approx(MEAN.seconds(name) - MEAN.floors_s[name])
    assert found["passes-launched-by-kernel"].savings_s["forward"] == pytest.approx(0.2 * 20)
    cures = {name for name, one in found.items() if one.is_curable}
    assert cures == {"passes-launched-by-kernel", "kernels-between-products"}


def test_larger_micro_batches_save_no_more_than_the_gpu_waits() -> None:
    seeded = replace(CLEAN, **SEEDS["small-micro-batches"])
    by_guess = find_causes(seeded, MEAN)[0]
    assert by_guess.cause == "small-micro-batches"
    assert by_guess.saving_s == pytest.approx((18 + 32) / 2)
    waiting = replace(seeded, kernels=KernelsSeen(products=0.5, attention=0.1, between=0.0, idle=0.4))
    (measured,) = (one for one in find_causes(waiting, MEAN) if one.cause == "small-micro-batches")
    assert measured.saving_s == pytest.approx(0.2 * 58)
    assert "small-micro-batches" not in names(replace(seeded, kernels=BUSY_GPU))


PAIRS = [
    ("attention-by-window", "prompts-prefilled-again"),
    ("attention-by-window", "images-encoded-again"),
    ("frozen-tower-backpropagated", "weights-cast-each-step"),
    ("decode-launched-by-kernel", "images-processed-again"),
    ("longest-answers-tail", "padding"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_two_causes_are_found_together_and_no_second_is_counted_twice(pair: tuple[str, str]) -> None:
    one, other = pair
    changes: dict[str, Any] = dict(SEEDS[one])
    for part, value in SEEDS[other].items():
        if part in changes:
            default = getattr(CLEAN, part)
            differing = {k: v for k, v in vars(value).items() if v != getattr(default, k)}
            changes[part] = replace(changes[part], **differing)
        else:
            changes[part] = value
    found = find_causes(replace(CLEAN, **changes), MEAN)
    assert {cause.cause for cause in found} == set(pair)
    alone = [find_causes(replace(CLEAN, **SEEDS[name]), MEAN)[0].saving_s or 0.0 for name in pair]
    together = sum(cause.saving_s or 0.0 for cause in found)
    assert max(alone) <= together <= sum(alone) + 1e-9
    for name in ("rollout/prefill", "rollout/decode", "forward", "backward"):
        taken = sum(cause.savings_s.get(name, 0.0) for cause in found)
        assert taken <= MEAN.seconds(name) - MEAN.floors_s.get(name, 0.0) + 1e-9
    assert found[0].saving_s == max(cause.saving_s or 0.0 for cause in found)


@v5_only
def test_what_a_plain_step_of_a_vision_language_model_shows(qwen: Path, tmp_path: Path) -> None:
    seen = seen_in(qwen, tmp_path / "plain", [])
    assert seen.rollout is not None
    assert (seen.rollout.engine, seen.rollout.rows, seen.rollout.distinct, seen.rollout.prefilled) == (
        "generate",
        4,
        1,
        4,
    )
    assert seen.rollout.is_cached is True
    assert seen.vision is not None
    assert (seen.vision.images, seen.vision.distinct) == (4, 1)
    assert seen.vision.attention_layers == 2
    assert seen.vision.attention_calls == 2 * 4 * 1, "images of one window: a call for each"
    assert not seen.vision.is_frozen
    assert (seen.processed, seen.processed_distinct) == (8, 1), "TRL processes each copy twice"
    assert set(names(seen)) == {
        "attention-by-window",
        "images-encoded-again",
        "prompts-prefilled-again",
        "images-processed-again",
    }

    cures = [PackedVisionCallback(strict=True), FastRolloutCallback("fast", strict=True)]
    cured = seen_in(qwen, tmp_path / "cured", cures)
    assert cured.rollout is not None
    assert (cured.rollout.engine, cured.rollout.prefilled, cured.rollout.distinct) == ("fast", 1, 1)
    assert cured.vision is not None
    assert (cured.vision.images, cured.vision.attention_calls) == (1, 2)
    assert names(cured) == []


@v5_only
def test_a_frozen_tower_that_is_backpropagated_is_seen(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    cures = [FastRolloutCallback("fast", strict=True)]
    seen = seen_in(qwen, tmp_path, cures, peft_config=LoraConfig(r=2, target_modules=LANGUAGE_QV))
    assert seen.vision is not None
    assert seen.vision.is_frozen
    assert seen.vision.wants_gradient
    assert "frozen-tower-backpropagated" in names(seen)
    cured = seen_in(
        qwen, tmp_path, [*cures, PackedVisionCallback()], peft_config=LoraConfig(r=2, target_modules=LANGUAGE_QV)
    )
    assert cured.vision is not None
    assert not cured.vision.wants_gradient


@v5_only
def test_a_rollout_without_a_cache_is_seen(llama: Path, tmp_path: Path) -> None:
    seen = seen_in(llama, tmp_path, [], with_images=False, generation_kwargs={"use_cache": False, "min_new_tokens": 8})
    assert seen.rollout is not None
    assert seen.rollout.is_cached is False
    assert names(seen) == ["cacheless-rollout", "prompts-prefilled-again"]


@v5_only
def test_weights_that_are_cast_in_each_step_are_seen(llama: Path, tmp_path: Path) -> None:
    seen = seen_in(llama, tmp_path, [], with_images=False, bf16=True)
    assert seen.rollout is not None
    linear = [m.weight for m in _loaded(llama).modules() if isinstance(m, torch.nn.Linear)]
    assert seen.rollout.cast_bytes == sum(w.numel() * 4 for w in linear)
    cured = seen_in(llama, tmp_path, [FastRolloutCallback("fast", strict=True)], with_images=False, bf16=True)
    assert cured.rollout is not None
    assert cured.rollout.cast_bytes == 0


def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def test_a_reward_that_computes_on_one_core_and_one_that_waits(llama: Path, tmp_path: Path) -> None:
    callback = StepTimeCallback(strict=True, floors=False)
    trainer = grpo_trainer(llama, tmp_path, [callback], with_images=False)
    callback.trainer = trainer

    def waiting(completions: list[Any], **_: Any) -> list[float]:
        time.sleep(0.5)
        return [float(index) for index in range(len(completions))]

    def computing(completions: list[Any], **_: Any) -> list[float]:
        began = time.process_time()
        while time.process_time() - began < 0.3:
            pass
        return [0.0] * len(completions)

    trainer.reward_funcs = [waiting, computing]
    trainer.reward_func_names = ["waiting", "computing"]
    trainer.reward_processing_classes = [None, None]
    trainer.reward_weights = torch.ones(2)
    trainer.train()
    seen = callback._seen
    assert seen is not None
    assert seen.rewards_cpu["waiting"] < 0.3
    assert seen.rewards_cpu["waiting"] < seen.rewards_cpu["computing"]
    assert callback.explanation is not None
    top = callback.explanation.causes[0]
    assert (top.cause, callback.explanation.top_cause) == ("rewards-one-by-one", "rewards-one-by-one")
    assert top.evidence.startswith(("waiting runs", "computing runs"))
    assert callback.rows[-1].parts_s["rewards/waiting"] >= 0.5


@v5_only
def test_a_clean_training_shows_nothing(llama: Path, tmp_path: Path) -> None:
    seen = seen_in(llama, tmp_path, [FastRolloutCallback("fast", strict=True)], with_images=False)
    assert seen.rollout is not None
    assert (seen.rollout.prefilled, seen.rollout.distinct) == (1, 1)
    assert names(seen, replace(MEAN, parts_s={"rollout/prefill": 10.0, "rollout/decode": 20.0})) == []


class SlowRows(torch.utils.data.Dataset[Any]):
    """Rows that take a while to be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        time.sleep(0.1)
        return {"input_ids": list(range(3, 9)), "labels": list(range(3, 9))}


def explained(model: Path, folder: Path, dataset: Any, **options: Any) -> list[str]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    defaults: dict[str, Any] = {"save_strategy": "no", "max_steps": 4, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **(defaults | options)
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
    )
    callback = StepTimeCallback(trainer=trainer, strict=True, floors=False)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.explanation is not None
    return [cause.cause for cause in callback.explanation.causes]


def test_rows_that_are_read_while_nothing_else_happens(llama: Path, tmp_path: Path) -> None:
    assert explained(llama, tmp_path / "slow", SlowRows()) == ["rows-read-in-line"]
    quick = [SlowRows()[index] for index in range(8)]
    assert explained(llama, tmp_path / "saving", quick, save_strategy="steps", save_steps=1)[0] == "saves-block"


@v5_only
def test_padding_in_a_supervised_training(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": ["one", "one two three four five six seven eight nine ten eleven twelve"] * 8})
    found = {}
    for is_packed in (False, True):
        settings = SFTConfig(
            output_dir=str(tmp_path / str(is_packed)), max_steps=2, per_device_train_batch_size=4, report_to="none",
            use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, max_length=64, packing=is_packed,
            packing_strategy="wrapped",
        )  # fmt: skip
        trainer = SFTTrainer(model=str(llama), args=settings, train_dataset=data)
        callback = StepTimeCallback(trainer=trainer, strict=True, floors=False)
        trainer.add_callback(callback)
        trainer.train()
        assert callback._seen is not None
        found[is_packed] = [one for one in find_causes(callback._seen, MEAN) if one.cause == "padding"]
    assert found[True] == []
    assert found[False][0].line == "SFTConfig(packing=True)"
