"""Hooks on a model in training: none of them harms a forward, whatever it meets."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
import trl
from packaging.version import Version
from transformers import DynamicCache, TrainerCallback

import grpo_toolkit
from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback, StepTimeCallback
from grpo_toolkit.export.policy_answers import _seen_dtype
from grpo_toolkit.latency.engines import timers
from grpo_toolkit.latency.engines.timers import VisionTimer, timed_images
from grpo_toolkit.model.attention.decode_without_cudnn import DecodeWithoutCudnn
from grpo_toolkit.model.cache_probe import CacheProbe, RolloutWatch
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.merge_guard import guard_merges
from tests.support.models import build_llama
from tests.support.training import LANGUAGE_QV, grpo_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from grpo_toolkit.model.generation.request import Request

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("hooks") / "llama")


@pytest.fixture
def model(qwen: Path) -> Any:
    return load_model(qwen)[0]


@pytest.fixture
def processor(qwen: Path) -> Any:
    return load_model(qwen)[1]


# --- Trainings whose rollouts are not `generate`'s -------------------------------------------------------------------


class KeptBase(TrainerCallback):  # type: ignore[misc]
    """Keeps an adapter's base through TRL's merges for vLLM, as ours do: without it the bare training drifts away."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guard_merges(kwargs["model"])


def assert_bit_equal(base: Path, folder: Path, **options: Any) -> KVCacheCallback:
    """Train bare and with all callbacks; the weights and what was logged must be the same to the last bit."""
    logs, weights = {}, {}
    keys = ("loss", "grad_norm", "reward", "completions/mean_length")
    kv_cache = KVCacheCallback(strict=True)
    callbacks = [
        kv_cache,
        ExportCallback(folder / "export", num_prompts=2, strict=True),
        LatencyCallback(rounds=1, new_tokens=4, max_new_tokens=6, strict=True),
        steps := StepTimeCallback(strict=True, floors=False),
    ]
    # TRL 1.0's first PEFT training in a process differs from its second, with or without us: so one to warm up.
    for name in (["first"] if "peft_config" in options else []) + ["bare", "ours"]:
        ours = callbacks if name == "ours" else [KeptBase()]
        trainer = grpo_trainer(base, folder / name, ours, with_images=False, **copy.deepcopy(options))
        steps.trainer = trainer
        trainer.train()
        logs[name] = [[row[key] for key in keys] for row in trainer.state.log_history if "grad_norm" in row]
        weights[name] = trainer.model.state_dict()
    assert len(logs["bare"]) == 2
    assert [row.step for row in steps.rows] == [1, 2]
    assert all(row.phases_s["rollout"] > 0 for row in steps.rows)
    assert all("weight_sync" in row.phases_s for row in steps.rows) == bool(options.get("use_vllm"))
    assert all(mean_length > 1 for *_, mean_length in logs["bare"])
    assert logs["ours"] == logs["bare"]
    assert all(torch.equal(weights["ours"][key], weights["bare"][key]) for key in weights["bare"])
    return kv_cache


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="continuous batching of transformers 4.57 runs on GPUs alone"
)
def test_continuous_batching_trains_to_the_same_bits(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"num_blocks": 16, "max_batch_tokens": 256}  # by default its cache fills the memory
    kv_cache = assert_bit_equal(
        llama,
        tmp_path,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=limits,
    )
    assert kv_cache.decoding is None
    assert [record.message for record in caplog.records if record.name.startswith("grpo_toolkit.model.hooks")] == []


class Engine:
    """A stand-in for `vllm.LLM`: a model of its own that answers by the weights it was last given."""

    def __init__(self, model: str, *, seed: int, **_: Any) -> None:
        self.model = load_model(Path(model))[0]
        self.random = torch.Generator().manual_seed(seed)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=runner)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=256))
        self.loaded = 0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.model.state_dict()[name].copy_(tensor)
            self.loaded += 1

    def reset_prefix_cache(self) -> None:
        assert self.loaded

    @torch.no_grad()
    def generate(self, prompts: list[Any], *, sampling_params: Any, **_: Any) -> list[Any]:
        return [self._answer(prompt["prompt_token_ids"], sampling_params.max_tokens) for prompt in prompts]

    def _answer(self, prompt: list[int], max_tokens: int) -> Any:
        said: list[int] = []
        logprobs = []
        for _ in range(max_tokens):
            odds = self.model(input_ids=torch.tensor([prompt + said])).logits[0, -1].log_softmax(-1)
            said.append(int(torch.multinomial(odds.exp(), 1, generator=self.random)))
            logprobs.append({said[-1]: SimpleNamespace(logprob=float(odds[said[-1]]), rank=1)})
        output = SimpleNamespace(token_ids=said, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


@pytest.mark.parametrize("peft", [False, True])
def test_rollouts_of_vllm_train_to_the_same_bits(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: bool
) -> None:
    from peft import LoraConfig
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
    if peft:
        options["peft_config"] = LoraConfig(r=4, lora_dropout=0.1, target_modules=LANGUAGE_QV)
    assert assert_bit_equal(llama, tmp_path, **options).decoding is None


# --- Every hook, and all that may raise under it ---------------------------------------------------------------------


def asked_by_us() -> bool:
    """Return whether the caller's caller is a module of the toolkit."""
    return str(sys._getframe(2).f_globals["__name__"]).startswith("grpo_toolkit.")


class ShyCache(DynamicCache):
    """A cache that answers its model and nobody else."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        if asked_by_us():
            raise RuntimeError("no length of mine")
        return int(super().get_seq_length(*args, **kwargs))


class ShyTensor(torch.Tensor):
    """An input that answers its model and nobody else, and so does all that is made of it."""

    @property
    def shape(self) -> torch.Size:
        if asked_by_us():
            raise RuntimeError("no shape of mine")
        return super().shape

    @property
    def dtype(self) -> torch.dtype:
        if asked_by_us():
            raise RuntimeError("no dtype of mine")
        return super().dtype


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no such thing")


@contextmanager
def watching(model: Any) -> Iterator[RolloutWatch]:
    watch = RolloutWatch(model)
    yield watch
    watch.close()


@contextmanager
def without_cudnn(model: Any) -> Iterator[DecodeWithoutCudnn]:
    hooks = DecodeWithoutCudnn(model)
    yield hooks
    hooks.close()


HOOKS: dict[str, Callable[[Any], Any]] = {
    "watch": watching,
    "probe": CacheProbe,
    "attention": without_cudnn,
    "policy": _seen_dtype,
    "timer": lambda model: VisionTimer(model, model.device),
}


def hooks_on(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, return_dict_in_generate=True, output_logits=True, **options
        )
    return torch.stack([step.as_subclass(torch.Tensor) for step in output.logits])


@pytest.mark.parametrize(
    ("hook", "fault", "said"),
    [
        ("watch", "cache", "watching how rollouts decode failed"),
        ("watch", "input", "watching how rollouts decode failed"),
        ("probe", "cache", "proving the KV cache failed"),
        ("probe", "input", "proving the KV cache failed"),
        ("probe", "state", "proving the KV cache failed"),
        ("attention", "input", "keeping decode steps off cuDNN's attention failed"),
        ("attention", "switch", "keeping decode steps off cuDNN's attention failed"),
        ("policy", "input", "seeing in which dtype the policy computes failed"),
        ("timer", "clock", "timing the vision tower failed"),
    ],
)
@pytest.mark.parametrize("thread", ["this thread", "another"])
def test_a_hook_that_fails_lets_go_and_the_forward_does_not_notice(
    hook: str,
    fault: str,
    said: str,
    thread: str,
    model: Any,
    processor: Any,
    image_request: Request,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = dict(prepare_inputs(processor, [image_request]))
    expected, before = answer(model, inputs), hooks_on(model)
    options: dict[str, Any] = {}
    if fault == "cache":
        options[CACHE] = ShyCache()
    elif fault == "input":
        inputs["input_ids"] = inputs["input_ids"].as_subclass(ShyTensor)
    elif fault == "clock":
        monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=fail))
    elif fault == "switch":
        switch = torch.backends.cuda.enable_cudnn_sdp

        def half_done(enabled: bool) -> None:
            switch(enabled)
            if not enabled:
                fail()

        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", half_done)
    got = []
    with caplog.at_level(logging.WARNING), HOOKS[hook](model) as installed:
        assert hooks_on(model) > before
        if fault == "state":
            installed.vision_calls = None
        run = threading.Thread(target=lambda: got.append(answer(model, inputs, **options)))
        if thread == "another":
            run.start()
            run.join()
        else:
            run.run()
        assert hooks_on(model) == before
    assert torch.equal(got[0], expected)
    assert [said in record.message for record in caplog.records if record.name == "grpo_toolkit.model.hooks"] == [True]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    if hook == "watch":
        assert installed.seen is None
    elif hook == "probe":
        assert installed.is_cached is None
    elif hook == "timer":
        assert installed.seconds(first_token=0.0) == (0.0, 0.0)


def test_what_a_hook_returns_is_dropped(model: Any) -> None:
    from grpo_toolkit.model.hooks import LookingHooks

    tokens = torch.arange(6)[None]
    expected = model(input_ids=tokens).logits
    hooks = LookingHooks("looking")
    hooks.before(model, lambda *_: ((), {}))
    hooks.after(model, lambda *_: "nothing")
    assert torch.equal(model(input_ids=tokens).logits, expected)
    hooks.close()


@pytest.mark.parametrize("cached", [True, False])
def test_a_cache_without_a_length_is_no_error(model: Any, cached: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.arange(6)[None]
    forward = model.forward
    # As continuous batching hands its cache to a model: a stranger among the arguments.
    model.forward = lambda *args, cache=None, **kwargs: forward(*args, **kwargs)
    before = hooks_on(model)
    watch = RolloutWatch(model)
    with torch.no_grad(), CacheProbe(model) as probe:
        for step in (tokens, tokens[:, :1] if cached else torch.arange(7)[None]):
            model(input_ids=step, cache=object())
    assert watch.seen is None
    assert hooks_on(model) == before
    assert probe.is_cached is (None if cached else False)
    assert caplog.records == []


def test_a_watched_model_is_copied_and_pickled(model: Any) -> None:
    watch, without = RolloutWatch(model), DecodeWithoutCudnn(model)
    pickle.dumps(model)
    copied = copy.deepcopy(model)
    hooks = hooks_on(copied)
    watch.close()
    without.close()
    assert hooks_on(copied) == hooks == hooks_on(model) + 3  # a copy has hooks of its own


def test_a_processor_that_fails_fails_as_without_us(processor: Any, image_request: Request) -> None:
    images = processor.image_processor

    class Broken(type(images)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no images today")

    images.__class__ = Broken
    with pytest.raises(RuntimeError, match="no images today"), timed_images(processor):
        prepare_inputs(processor, [image_request])
    assert processor.image_processor is images


def test_no_hook_is_put_on_a_forward_elsewhere() -> None:
    package = Path(grpo_toolkit.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "register_forward" in path.read_text(encoding="utf-8")]
    # distinct_images changes what a tower is given, and guards itself (test_distinct_images.py).
    assert sorted(found) == ["distinct_images.py", "hooks.py"]


def test_a_save_that_cannot_be_prepared_is_the_trainers_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback = KVCacheCallback(strict=True)
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "with_images": False}
    trainer = grpo_trainer(llama, tmp_path / "out", [callback], **options)
    monkeypatch.setattr(grpo_toolkit.model.saving.save_hook, "generation_config_of", fail)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").is_file()
    said = [record.message for record in caplog.records if record.name == "grpo_toolkit.model.saving.save_hook"]
    assert said == [
        "grpo_toolkit: preparing a save failed (RuntimeError: no such thing); its files say what the trainer's "
        "configs say"
    ]
