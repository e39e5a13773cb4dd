"""Decoding ahead: the next step is queued before a token is looked at, and a static cache serves many requests."""

from __future__ import annotations

import itertools
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.generation import utils

from grpo_toolkit import DecodeAhead, ahead
from grpo_toolkit.ahead import deferred_stops
from grpo_toolkit.inference import load_model
from grpo_toolkit.inputs import prepare_inputs
from grpo_toolkit.latency.engines.local import LocalEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.workload import made_up
from models import build_llama

if TYPE_CHECKING:
    from pathlib import Path

CAN_DEFER = hasattr(utils, "DeferredStopCheck")
MAKES_CACHES = hasattr(utils.GenerationMixin, "_prepare_static_cache")
defers = pytest.mark.skipif(not CAN_DEFER, reason="this release checks stops at once")
makes_caches = pytest.mark.skipif(not MAKES_CACHES, reason="this release keeps its static cache by itself")
PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


class NoEvent:
    """`torch.Event` of a device that has done what it was told: a CPU has none of its own."""

    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(build_llama(tmp_path_factory.mktemp("ahead") / "llama"))[0]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", NoEvent)


class Log:
    """What happened in which order: forwards of the model, and tokens that reached the host."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.events: list[str] = []
        self.said: list[int] = []
        self._model = model
        self._saw_prompt = False

    def __enter__(self) -> Log:
        self._hook = self._model.register_forward_pre_hook(lambda *_: self.events.append("forward"))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self.events.append("token")
            self.said += value.tolist()
        self._saw_prompt = True

    def end(self) -> None: ...


def watched(model: Any, generate: Any, **settings: Any) -> Log:
    with Log(model) as log:
        generate(input_ids=PROMPT, do_sample=False, streamer=log, **settings)
    return log


@defers
def test_the_next_step_is_queued_before_a_token_is_looked_at(llama: Any, as_on_a_gpu: None) -> None:
    plain = watched(llama, llama.generate, max_new_tokens=4)
    late = watched(llama, DecodeAhead(llama).generate, max_new_tokens=4)
    assert plain.events == ["forward", "token"] * 4
    assert late.events == ["forward", *["forward", "token"] * 3, "token"]
    assert late.said == plain.said


@defers
def test_the_end_is_all_that_generate_waits_for_at_a_token(qwen: Path) -> None:
    """A value that is read from a device is waited for. Ahead, it is read when it has long been there."""
    model, processor, _ = load_model(qwen)
    traffic = made_up(processor, prompt_tokens=96, image_tokens=16, max_new_tokens=1)
    inputs = prepare_inputs(processor, traffic.batch(0))

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default")
            return func(*args, **(kwargs or {}))

    def reads(tokens: int, **settings: Any) -> int:
        with Reads() as mode:
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **settings)
        return mode.count

    for cache in ({}, {"cache_implementation": "static"}):
        assert reads(12, **cache) - reads(6, **cache) == 6


@defers
def test_one_forward_more_after_an_end_and_no_token(llama: Any, as_on_a_gpu: None) -> None:
    end = watched(llama, llama.generate, max_new_tokens=8).said[2]
    plain = watched(llama, llama.generate, max_new_tokens=8, eos_token_id=end)
    late = watched(llama, DecodeAhead(llama).generate, max_new_tokens=8, eos_token_id=end)
    assert (plain.events.count("forward"), late.events.count("forward")) == (3, 4)
    assert late.said == plain.said
    assert len(late.said) == 3


@defers
def test_nothing_is_deferred_on_a_cpu_nor_for_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(llama, DecodeAhead(llama).generate, max_new_tokens=3).events == ["forward", "token"] * 3
    monkeypatch.setattr(ahead, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", NoEvent)
    logs: list[Log] = []
    with deferred_stops():
        other = Thread(target=lambda: logs.append(watched(llama, llama.generate, max_new_tokens=3)))
        other.start()
        other.join()
    logs.append(watched(llama, llama.generate, max_new_tokens=3))
    assert [log.events for log in logs] == [["forward", "token"] * 3] * 2


STATIC: dict[str, Any] = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None}


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every static cache that `generate` makes."""
    made: list[Any] = []
    original = StaticCache.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(StaticCache, "__init__", counted)
    return made


def prompt(seed: int, *, length: int = 7, batch: int = 1) -> torch.Tensor:
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@makes_caches
def test_one_cache_serves_many_requests(llama: Any, caches: list[Any]) -> None:
    settings = STATIC | {"max_new_tokens": 6}
    said = [llama.generate(prompt(seed), **settings) for seed in range(3)]
    assert len(caches) == 3  # the fault: one for each request
    decoder = DecodeAhead(llama)
    assert all(torch.equal(decoder.generate(prompt(seed), **settings), said[seed]) for seed in range(3))
    assert len(caches) == 4
    decoder.generate(prompt(3, length=5), **settings)
    assert len(caches) == 4  # a shorter one fits


@makes_caches
def test_a_cache_that_does_not_serve_is_made_anew(llama: Any, caches: list[Any]) -> None:
    decoder = DecodeAhead(llama)
    requests = {
        (0, 1, 4): 1,  # seed, batch size, new tokens: caches that are made
        (1, 2, 4): 1,
        (2, 2, 40): 1,
        (3, 2, 4): 0,
    }
    for (seed, batch, length), wanted in requests.items():
        before = len(caches)
        said = decoder.generate(prompt(seed, batch=batch), **STATIC, max_new_tokens=length)
        assert len(caches) - before == wanted
        changes = STATIC | {"cache_implementation": None, "max_new_tokens": length}
        assert torch.equal(said, llama.generate(prompt(seed, batch=batch), **changes))
    with torch.inference_mode():
        decoder.generate(prompt(5, batch=1), **STATIC, max_new_tokens=4)
    before = len(caches)
    decoder.generate(prompt(5, batch=1), **STATIC, max_new_tokens=4)  # a tensor of inference mode cannot be emptied
    assert len(caches) == before + 1


@makes_caches
def test_a_model_in_another_dtype_has_a_cache_of_its_own(caches: list[Any], tmp_path: Path) -> None:
    model = load_model(build_llama(tmp_path / "llama"))[0]
    decoder = DecodeAhead(model)
    decoder.generate(prompt(0), **STATIC, max_new_tokens=4)
    model.to(torch.bfloat16)
    decoder.generate(prompt(0), **STATIC, max_new_tokens=4)
    assert [cache.layers[0].keys.dtype for cache in caches] == [torch.float32, torch.bfloat16]


@makes_caches
def test_a_request_that_failed_leaves_nothing_behind(llama: Any) -> None:
    decoder = DecodeAhead(llama)
    wanted = llama.generate(prompt(0), **STATIC, max_new_tokens=6)

    for breaks_at in (1, 3, 2):  # in the first prefill, and on a cache that is in use
        count = itertools.count(1)

        def fail(*_: Any, at: int = breaks_at, count: Any = count) -> None:
            if next(count) == at:
                raise ZeroDivisionError

        hook = llama.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            decoder.generate(prompt(1), **STATIC, max_new_tokens=6)
        hook.remove()
        assert torch.equal(decoder.generate(prompt(0), **STATIC, max_new_tokens=6), wanted)
    assert "_prepare_static_cache" not in vars(llama)


def test_an_adapter_decodes_ahead(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        load_model(build_llama(tmp_path / "llama"))[0], LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    wanted = model.generate(input_ids=prompt(0), **STATIC, max_new_tokens=6)
    decoder = DecodeAhead(model)
    for _ in range(2):
        assert torch.equal(decoder.generate(input_ids=prompt(0), **STATIC, max_new_tokens=6), wanted)


def test_a_vision_language_model_says_the_same(qwen: Path, as_on_a_gpu: None) -> None:
    model, processor, _ = load_model(qwen)
    engine = LocalEngine(model, processor)
    for kind in ("fixed", "natural"):
        traffic = made_up(processor, kind=kind, prompt_tokens=220, image_tokens=16, max_new_tokens=6, batch_size=2)
        for turn in range(2):
            plain = engine.ask(traffic.batch(turn), Options())
            late = engine.ask(traffic.batch(turn), Options(ahead=True))
            assert late.tokens == plain.tokens
            assert len(late.timeline.token_times_s) == len(plain.timeline.token_times_s)
            assert sum(late.timeline.phases_s.values()) == pytest.approx(late.timeline.e2e_s)


@makes_caches
@pytest.mark.slow
def test_a_compiled_step_is_compiled_once_for_many_requests(qwen: Path) -> None:
    from torch._dynamo.utils import counters

    model, processor, _ = load_model(qwen)
    engine = LocalEngine(model, processor)
    options = Options(cache_implementation="static", compiled=True, compile_mode="default", ahead=True)
    traffic = made_up(processor, prompt_tokens=96, image_tokens=16, max_new_tokens=4)
    tokens = [engine.ask(traffic.batch(turn), options).tokens for turn in range(2)]
    graphs = counters["stats"]["unique_graphs"]
    tokens += [engine.ask(traffic.batch(turn), options).tokens for turn in range(2, 4)]
    assert counters["stats"]["unique_graphs"] == graphs
    assert tokens == [engine.ask(traffic.batch(turn), Options()).tokens for turn in range(4)]


@makes_caches
@pytest.mark.slow
def test_one_length_of_the_cache_is_compiled_once_for_all_lengths(llama: Any) -> None:
    from torch._dynamo.utils import counters
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True

    def compilations(generate: Any) -> list[int]:
        torch.compiler.reset()
        llama._previous_max_cache_length = -1
        found = []
        for length in (7, 9, 12):
            before = counters["stats"]["unique_graphs"]
            generate(prompt(length, length=length), **STATIC, max_new_tokens=3, compile_config=config)
            found.append(counters["stats"]["unique_graphs"] - before)
        return found

    assert compilations(llama.generate) == [1, 1, 0]  # the fault: a length of its own, then any length
    assert compilations(DecodeAhead(llama, max_cache_len=32).generate) == [1, 0, 0]
