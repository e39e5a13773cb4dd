"""Decoding ahead: the next step is queued before a token is looked at, and a static cache serves many requests."""

from __future__ import annotations

import gc
import itertools
import weakref
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, StaticCache
from transformers.generation import utils

from grpo_toolkit import DecodeAhead
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.local import LocalEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.cache_probe import cache_in
from grpo_toolkit.model.generation import decode_ahead
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.decode_ahead import deferred_stops
from grpo_toolkit.model.load import load_model
from tests.support.models import build_llama

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

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
    monkeypatch.setattr(decode_ahead, "DEVICES", ("cpu",))
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


class Reads(TorchDispatchMode):
    """Counts what waits for a device: values that are read from it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default")
        return func(*args, **(kwargs or {}))


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

    def reads(tokens: int, **settings: Any) -> int:
        with Reads() as mode:
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **settings)
        return mode.count

    static = {"cache_implementation": "static"}
    assert reads(12, **static) - reads(6, **static) == 6
    masks_read_too = Version(transformers.__version__) < Version("5.18")  # 5.17, with a dynamic cache; 5.23 not
    assert reads(12) - reads(6) == (12 if masks_read_too else 6)


@defers
def test_one_forward_more_after_an_end_and_no_token(llama: Any, as_on_a_gpu: None) -> None:
    end = watched(llama, llama.generate, max_new_tokens=8).said[2]
    plain = watched(llama, llama.generate, max_new_tokens=8, eos_token_id=end)
    late = watched(llama, DecodeAhead(llama).generate, max_new_tokens=8, eos_token_id=end)
    assert (plain.events.count("forward"), late.events.count("forward")) == (3, 4)
    assert late.said == plain.said
    assert len(late.said) == 3


@defers
def test_nothing_is_deferred_without_a_cache(llama: Any, as_on_a_gpu: None) -> None:
    """Its steps keep a GPU busy, and the vision tower, which runs in each, is timed by where the first token is."""
    log = watched(llama, DecodeAhead(llama).generate, max_new_tokens=3, use_cache=False)
    assert log.events == ["forward", "token"] * 3


@defers
def test_nothing_is_deferred_on_a_cpu_nor_for_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(llama, DecodeAhead(llama).generate, max_new_tokens=3).events == ["forward", "token"] * 3
    monkeypatch.setattr(decode_ahead, "DEVICES", ("cpu",))
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
def caches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The keys of the first layer of every static cache that was filled, each memory once."""
    filled: list[torch.Tensor] = []
    original = StaticCache.update

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if not any(self.layers[0].keys is keys for keys in filled):
            filled.append(self.layers[0].keys)
        return found

    monkeypatch.setattr(StaticCache, "update", noted)
    return filled


def prompt(seed: int, *, length: int = 7, batch: int = 1) -> torch.Tensor:
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@makes_caches
def test_one_cache_serves_many_requests(llama: Any, caches: list[torch.Tensor]) -> None:
    settings = STATIC | {"max_new_tokens": 6}
    said = [llama.generate(prompt(seed), **settings) for seed in range(3)]
    assert len(caches) == 3  # the fault: one for each request
    decoder = DecodeAhead(llama)
    assert all(torch.equal(decoder.generate(prompt(seed), **settings), said[seed]) for seed in range(3))
    assert len(caches) == 4
    decoder.generate(prompt(3, length=5), **settings)
    assert len(caches) == 4  # a shorter one fits


@makes_caches
def test_a_cache_that_does_not_serve_is_made_anew(llama: Any, caches: list[torch.Tensor]) -> None:
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
def test_a_model_in_another_dtype_has_a_cache_of_its_own(caches: list[torch.Tensor], tmp_path: Path) -> None:
    model = load_model(build_llama(tmp_path / "llama"))[0]
    decoder = DecodeAhead(model)
    decoder.generate(prompt(0), **STATIC, max_new_tokens=4)
    model.to(torch.bfloat16)
    decoder.generate(prompt(0), **STATIC, max_new_tokens=4)
    assert [keys.dtype for keys in caches] == [torch.float32, torch.bfloat16]


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


@makes_caches
def test_a_cache_is_as_long_as_the_longest_so_far(caches: list[torch.Tensor], tmp_path: Path) -> None:
    model = load_model(build_llama(tmp_path / "llama"))[0]
    model.generate(prompt(0), **STATIC, max_new_tokens=40)
    decoder = DecodeAhead(model)
    for length in (3, 5, 7, 9):
        decoder.generate(prompt(0, length=length), **STATIC, max_new_tokens=4)
    assert len(caches) == 2


@makes_caches
@pytest.mark.parametrize("max_cache_len", [None, 50])
def test_a_cache_is_of_a_length_that_tensor_cores_read_fast(
    caches: list[torch.Tensor], tmp_path: Path, max_cache_len: int | None
) -> None:
    model = load_model(build_llama(tmp_path / "llama"))[0]
    plain = model.generate(prompt(0), **STATIC, max_new_tokens=6)
    said = DecodeAhead(model, max_cache_len=max_cache_len).generate(prompt(0), **STATIC, max_new_tokens=6)
    assert torch.equal(said, plain)
    assert [keys.shape[2] for keys in caches] == [12, 16 if max_cache_len is None else 56]  # 12: the library's


@makes_caches
def test_a_cache_that_is_returned_is_the_callers(llama: Any) -> None:
    decoder = DecodeAhead(llama)
    given = cache_in(decoder.generate(prompt(0), **STATIC, max_new_tokens=6, return_dict_in_generate=True))
    keys = given.layers[0].keys.clone()
    decoder.generate(prompt(1), **STATIC, max_new_tokens=6)
    assert torch.equal(given.layers[0].keys, keys)


@makes_caches
@pytest.mark.parametrize("inside", ["model", "decoder"])
def test_a_request_within_a_request_has_a_cache_of_its_own(llama: Any, inside: str) -> None:
    decoder = DecodeAhead(llama)
    generate = {"model": llama, "decoder": decoder}[inside].generate

    def asks(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generate(prompt(1), **STATIC, max_new_tokens=4)
        return scores

    wanted = llama.generate(prompt(0), **STATIC, max_new_tokens=6)
    for _ in range(2):
        said = decoder.generate(prompt(0), **STATIC, max_new_tokens=6, logits_processor=[asks])
        assert torch.equal(said, wanted)
    assert "_prepare_static_cache" not in vars(llama)


@makes_caches
def test_a_request_of_another_thread_has_a_cache_of_its_own(llama: Any) -> None:
    decoder = DecodeAhead(llama)
    said: dict[str, torch.Tensor] = {}

    def ask(name: str, generate: Any, seed: int) -> None:
        said[name] = generate(prompt(seed), **STATIC, max_new_tokens=6)

    def meanwhile(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for name, generate in (("model", llama.generate), ("decoder", decoder.generate)):
            other = Thread(target=ask, args=(name, generate, 1))
            other.start()
            other.join()
        return scores

    for _ in range(2):
        said["own"] = decoder.generate(prompt(0), **STATIC, max_new_tokens=6, logits_processor=[meanwhile])
        for name, seed in {"own": 0, "model": 1, "decoder": 1}.items():
            assert torch.equal(said[name], llama.generate(prompt(seed), **STATIC, max_new_tokens=6))


@makes_caches
def test_a_prefill_into_a_kept_cache_reads_no_more_from_the_device(llama: Any) -> None:
    """A cache that is full is asked for its length, which is on the device."""
    decoder = DecodeAhead(llama)
    reads = []
    for generate in (llama.generate, decoder.generate, decoder.generate):
        with Reads() as mode:
            generate(prompt(0), **STATIC, max_new_tokens=1)
        reads.append(mode.count)
    assert reads[0] == reads[1] == reads[2]


@makes_caches
@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"prefill_chunk_size": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_other_ways_of_decoding_say_the_same(llama: Any, settings: dict[str, Any]) -> None:
    decoder = DecodeAhead(llama)
    for seed in range(3):
        for changes in (settings, {}):
            wanted = llama.generate(prompt(seed), **STATIC | changes, max_new_tokens=6)
            assert torch.equal(decoder.generate(prompt(seed), **STATIC | changes, max_new_tokens=6), wanted)


def _made(architecture: str) -> Any:
    """A tiny model whose static cache is not a row of equal layers that one method makes."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    linear = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 16}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16}
    torch.manual_seed(0)
    if architecture == "sliding window":
        return transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**sizes, **heads, sliding_window=4, query_pre_attn_scalar=8)
        ).eval()
    if architecture == "linear attention":
        config = transformers.Qwen3NextConfig(**sizes, **heads, **linear, **experts, **kinds)
        return transformers.Qwen3NextForCausalLM(config).eval()
    if architecture == "encoder and decoder":
        shape = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**shape, pad_token_id=0, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config).eval()

    class OfItsOwn(transformers.LlamaForCausalLM):
        def _prepare_static_cache(self, *args: Any, model_kwargs: Any, **kwargs: Any) -> Any:  # as Mllama's
            return super()._prepare_static_cache(*args, model_kwargs=model_kwargs, **kwargs)

    return OfItsOwn(transformers.LlamaConfig(**sizes, **heads)).eval()


@makes_caches
@pytest.mark.parametrize(
    "architecture", ["sliding window", "linear attention", "encoder and decoder", "a method of its own"]
)
def test_other_caches(architecture: str) -> None:
    model = _made(architecture)
    decoder = DecodeAhead(model)
    for seed, length in enumerate((7, 3, 7, 2)):  # longer and shorter than the window
        wanted = model.generate(prompt(seed, length=length), **STATIC, max_new_tokens=6)
        assert torch.equal(decoder.generate(prompt(seed, length=length), **STATIC, max_new_tokens=6), wanted)


@defers
def test_stops_are_deferred_where_the_library_waits_for_the_right_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.Event(device="cuda:1")` is recorded on the stream of the current device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cache = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=8)
    with deferred_stops():

        def supports(device: str, cache: Any = cache, *, returned: bool = False) -> bool:
            return bool(
                utils.DeferredStopCheck.is_supported(torch.device(device), cache, returned, is_assistant=False)
            )

        assert supports("cuda:0")
        assert supports("cuda")
        assert not supports("cuda:1")
        # 5.24 takes a step back in a cache that it returns; before, no static one can.
        assert supports("cuda:0", returned=True) is (Version(transformers.__version__) >= Version("5.24"))


@makes_caches
def test_no_memory_is_held_for_nothing(llama: Any) -> None:
    decoder = DecodeAhead(llama)
    kept: list[Any] = []

    def fail(*_: Any) -> None:
        kept.extend(weakref.ref(layer.keys) for layer in decoder_layers)
        raise ZeroDivisionError

    decoder.generate(prompt(0), **STATIC, max_new_tokens=6)
    decoder_layers = list(decoder._layers)
    assert len(decoder_layers) == 2
    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            decoder.generate(prompt(1), **STATIC, max_new_tokens=6)
        decoder_layers.clear()
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()
        hook.remove()
    decoder.generate(prompt(0), **STATIC, max_new_tokens=6, prefill_chunk_size=3)
    assert decoder._layers == []  # the library has its memory made before the prefill: there is none to spare


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
def test_nothing_that_a_cuda_graph_holds_the_address_of_moves(qwen: Path) -> None:
    """Inputs that are marked as having a fixed address: where one has moved, a CUDA graph is recorded again."""
    from transformers.generation.configuration_utils import CompileConfig

    model, processor, _ = load_model(qwen)
    traffic = made_up(processor, prompt_tokens=96, image_tokens=16, max_new_tokens=3)
    fixed: list[list[torch.Tensor]] = []

    def backend(graph: Any, _: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        marked = [bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")) for node in inputs]

        def run(*given: Any) -> Any:
            fixed.append(list(itertools.compress(given, marked)))
            return graph(*given)

        return run

    compiled = CompileConfig(backend=backend, mode=None)
    compiled._compile_all_devices = True

    def moved(generate: Any) -> int:
        """Between two requests."""
        for turn in range(2):
            inputs = prepare_inputs(processor, traffic.batch(turn))
            generate(**inputs, **STATIC, max_new_tokens=3, compile_config=compiled)
        before, after = fixed[-3], fixed[-1]
        return sum(one is not other for one, other in zip(before, after, strict=True))

    assert moved(model.generate) == 6  # keys, values and length of two layers
    assert moved(DecodeAhead(model).generate) == 0
    assert len(fixed) == 8


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
