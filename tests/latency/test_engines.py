"""Engines on real models: phases that add up, batches, caches, memory, a process of its own, and what runs out."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.errors import InputError, OutOfMemoryError, UnsupportedError
from grpo_toolkit.latency.bench.workload import made_up, traffic_of
from grpo_toolkit.latency.engines.arms import Arm, processor_of
from grpo_toolkit.latency.engines.local import LocalEngine
from grpo_toolkit.latency.engines.pool import open_engine
from grpo_toolkit.latency.engines.process import ProcessEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.engines.think_markers import count_thinking
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_model, load_processor
from grpo_toolkit.step_time.seams.attention_calls import AttentionCalls
from scripts.models.base_variants import build_text_base
from tests.support.training import forgets_in_training, v5_only

pytestmark = pytest.mark.stack

OLDEST = Version(transformers.__version__) < Version("4.57")
STATIC = pytest.param(
    Options(cache_implementation="static", compiled=False),
    marks=pytest.mark.skipif(OLDEST, reason="Qwen2.5-VL has no static cache in transformers 4.49"),
)
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_only_layers": [0, 1],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PHASES = {"tokenize_s", "image_s", "transfer_s", "vision_s", "prefill_s", "decode_s", "detokenize_s"}


@pytest.fixture(scope="module")
def engine(qwen: Path) -> LocalEngine:
    model, processor, _ = load_model(qwen)
    return LocalEngine(model, processor)


def batch(engine: LocalEngine, **changes: Any) -> list[Request]:
    settings = {"prompt_tokens": 220, "image_tokens": 16, "max_new_tokens": 6} | changes
    return made_up(engine.processor, **settings).batch(0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", [Options(), Options(use_cache=False), STATIC])
def test_phases_add_up_to_the_whole_request(engine: LocalEngine, options: Options, size: int) -> None:
    timeline = engine.ask(batch(engine, batch_size=size), options).timeline
    assert set(timeline.phases_s) == PHASES
    assert sum(timeline.phases_s.values()) == pytest.approx(timeline.e2e_s)
    assert min(timeline.phases_s.values()) >= 0
    assert timeline.phases_s["vision_s"] > 0
    assert len(timeline.token_times_s) == 6
    assert (timeline.output_lengths, timeline.output_tokens) == ([6] * size, 6 * size)
    assert (timeline.prompt_tokens, timeline.image_tokens) == (220, 16)


@pytest.mark.parametrize("options", [Options(), STATIC])
def test_the_cache_holds_what_theory_says(engine: LocalEngine, options: Options) -> None:
    evidence = engine.prove(batch(engine, batch_size=2), options)
    sizes = engine.facts().sizes
    assert sizes is not None
    assert sizes.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head dim, float32
    assert evidence.kv_bytes == sizes.kv_bytes_per_token * (220 + 6 - 1) * 2
    assert evidence.proof.step_lengths == [220, 1, 1, 1, 1, 1]
    assert (evidence.proof.is_cached, evidence.proof.vision_calls, evidence.patches) == (True, 1, 2 * 16 * 4)


@v5_only
def test_a_layer_of_linear_attention_has_no_keys_to_count(tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(build_text_base("Qwen3Next", tmp_path / "base", **LINEAR))
    requests = made_up(tokenizer, prompt_tokens=20, max_new_tokens=3).batch(0)
    evidence = LocalEngine(model, tokenizer).prove(requests, Options())
    assert evidence.proof.step_lengths == [20, 1, 1]
    assert evidence.kv_bytes == 2 * 2 * 16 * 4 * (20 + 3 - 1)  # keys and values of one layer, KV heads, head dim


def test_the_timed_answer_and_the_observed_one_say_the_same(engine: LocalEngine) -> None:
    requests = batch(engine, batch_size=2)
    plain = engine.ask(requests, Options()).tokens
    assert engine.prove(requests, Options()).tokens == plain
    assert engine.ask(requests, Options(use_cache=False)).tokens == plain
    if not OLDEST:
        assert engine.ask(requests, Options(cache_implementation="static", compiled=False)).tokens == plain


def test_a_batch_says_what_its_requests_say_alone(engine: LocalEngine) -> None:
    requests = [batch(engine)[0], made_up(engine.processor, prompt_tokens=150, max_new_tokens=6).batch(4)[0]]
    together = engine.ask(requests, Options()).tokens
    assert together == [engine.ask([request], Options()).tokens[0] for request in requests]


def test_natural_answers_end_at_the_models_own_end(engine: LocalEngine) -> None:
    request = Request(messages=[{"role": "user", "content": "What?"}], max_new_tokens=12)
    said = engine.ask([request], Options()).tokens[0]
    assert len(said) > 2
    stopped = engine.ask([request], Options(eos_token_ids=(said[1],)))
    assert stopped.tokens == [said[:2]]
    assert (stopped.timeline.output_lengths, stopped.timeline.is_capped) == ([2], False)
    capped = engine.ask([replace(request, max_new_tokens=1)], Options(eos_token_ids=(said[1],)))
    assert (capped.timeline.output_tokens, capped.timeline.is_capped, capped.timeline.tpot_s) == (1, True, None)
    exact = engine.ask([replace(request, exact=True)], Options(eos_token_ids=(said[1],)))
    assert exact.timeline.output_lengths == [12]


def hook_counts(model: Any) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_measuring_leaves_the_model_as_it_was(engine: LocalEngine) -> None:
    generation_config = engine.model.generation_config
    before, modes = dict(vars(generation_config)), [module.training for module in engine.model.modules()]
    images = engine.processor.image_processor
    hooks = hook_counts(engine.model)
    options = Options(training=True, use_cache=False, eos_token_ids=(5,), cache_implementation="dynamic")
    engine.ask(batch(engine), options)
    assert dict(vars(generation_config)) == before
    assert [module.training for module in engine.model.modules()] == modes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in engine.model.modules())
    assert engine.processor.image_processor is images
    assert hook_counts(engine.model) == hooks


@forgets_in_training
def test_left_in_training_is_seen_without_a_clock(engine: LocalEngine) -> None:
    assert not engine.prove(batch(engine), Options(training=True)).proof.is_cached


@pytest.mark.parametrize("backend", ["math", "no_cudnn"])
def test_an_sdpa_backend_is_used_for_the_answer(engine: LocalEngine, backend: Any) -> None:
    assert engine.ask(batch(engine), Options(sdpa_backend=backend)).timeline.output_tokens == 6


@pytest.mark.slow
@pytest.mark.skipif(OLDEST, reason="Qwen2.5-VL has no static cache in transformers 4.49")
def test_a_compiled_step_is_compiled_anew_for_other_sdpa_kernels(engine: LocalEngine) -> None:
    """torch itself would run what it compiled for the kernels of the first call: its guards know nothing of them."""
    from torch._dynamo.utils import counters

    def compilations(**changes: Any) -> int:
        before = counters["stats"]["unique_graphs"]
        options = Options(cache_implementation="static", compiled=True, compile_mode="default", **changes)
        engine.ask(batch(engine, max_new_tokens=3), options)
        return int(counters["stats"]["unique_graphs"] - before)

    first = compilations()
    assert first > 0
    assert compilations() == 0
    assert compilations(sdpa_backend="math") == first
    assert compilations(sdpa_backend="math") == 0


@pytest.mark.slow
@pytest.mark.skipif(OLDEST, reason="Qwen2.5-VL has no static cache in transformers 4.49")
def test_a_compiled_step_has_the_sdpa_kernels_that_were_asked_for(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps compiled graphs on the disk under keys that do not know the kernels, also for later processes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    flash, math = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"

    def kernels(**changes: Any) -> set[str]:
        torch.compiler.reset()
        options = Options(cache_implementation="static", compiled=True, compile_mode="default", **changes)
        engine.ask(batch(engine, max_new_tokens=4), options)
        with torch.profiler.profile() as profiler:
            engine.ask(batch(engine, max_new_tokens=4), options)
        return {event.key for event in profiler.key_averages()} & {flash, math}

    assert kernels() == {flash}
    assert kernels(sdpa_backend="math") == {math}
    assert kernels() == {flash}


def test_packed_vision_says_the_same_in_a_call_a_layer_and_leaves_nothing(engine: LocalEngine) -> None:
    requests = [request for request in batch(engine) for _ in range(2)]
    hooks = hook_counts(engine.model)
    said, calls = {}, {}
    for packed in (False, True):
        options = Options(packed_vision=packed)
        counting = AttentionCalls()
        try:
            said[packed] = (engine.ask(requests, options).tokens, engine.prove(requests, options).tokens)
        finally:
            counting.close()
        calls[packed] = len(counting.lengths)
    assert said[True] == said[False]
    # Two images, one of them encoded, each in one call a layer; 4.49's tower is left as it is.
    assert calls[True] < calls[False] or OLDEST
    assert hook_counts(engine.model) == hooks


def test_a_backend_without_a_kernel_is_said(engine: LocalEngine) -> None:
    with pytest.raises(UnsupportedError, match="no SDPA kernel of those allowed"):
        engine.ask(batch(engine), Options(sdpa_backend="cudnn"))


@pytest.mark.skipif(not OLDEST, reason="newer ones have a static cache")
def test_a_cache_that_the_library_lacks_is_said(engine: LocalEngine) -> None:
    with pytest.raises(UnsupportedError, match="does not support `cache_implementation='static'`"):
        engine.ask(batch(engine), Options(cache_implementation="static"))


def test_one_batch_asks_for_one_length(engine: LocalEngine) -> None:
    one, other = batch(engine, batch_size=2)
    with pytest.raises(InputError, match="as many new tokens"):
        engine.ask([one, replace(other, max_new_tokens=7)], Options())


def test_every_family_is_timed(any_base: Path) -> None:
    model, processor, _ = load_model(any_base)
    engine = LocalEngine(model, processor)
    has_images = hasattr(processor, "image_processor")
    traffic = made_up(processor, kind="natural", image_tokens=16 if has_images else None, max_new_tokens=4)
    answer = engine.ask(traffic.batch(0), Options())
    assert 1 <= answer.timeline.output_tokens <= 4
    assert (answer.timeline.phases_s["vision_s"] > 0) is has_images
    sizes = engine.facts().sizes
    assert sizes is not None
    assert sizes.parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["4"], 0),
        (["<think>", "hm", "</think>", "<answer>", "4", "</answer>"], 4),
        (["<th", "ink>hm</th", "ink> ", "4"], 2),
        (["<think>", "hm", "</think>"], 3),
        (["<think>", "hm"], 2),
        ([" ", "<think>", "hm"], 3),
        (["so <think> it is"], 0),
        ([], 0),
    ],
)
def test_where_thinking_ends(pieces: list[str], expected: int) -> None:
    assert count_thinking(pieces) == expected


def test_a_process_answers_as_the_model_does_here(engine: LocalEngine, qwen: Path) -> None:
    requests = batch(engine, batch_size=2)
    with ProcessEngine(qwen, Options()) as process:
        assert process.facts().sizes == engine.facts().sizes
        assert process.facts().dtype == "float32"
        answer = process.ask(requests, Options())
        here = engine.ask(requests, Options())
        assert (answer.tokens, answer.texts) == (here.tokens, here.texts)
        assert answer.timeline.phases_s.keys() == here.timeline.phases_s.keys()
        assert answer.peak_allocated_bytes is None
        assert (answer.peak_resident_bytes or 0) > 1e8
        assert process.prove(requests, Options(use_cache=False)).proof.is_cached is False
        found = process.probe_hardware()
        assert found["bandwidth_bytes_per_s"] > 1e8
        assert found["flops_per_s"] > 1e8


def test_how_a_process_loads(engine: LocalEngine, qwen: Path) -> None:
    options = Options(dtype="bfloat16", attn_implementation="eager", max_pixels=3136, threads=1)
    with ProcessEngine(qwen, options) as process:
        facts = process.facts()
        assert (facts.dtype, facts.attn_implementation, facts.environment["threads"]) == ("bfloat16", "eager", "1")
        # An image of 16 tokens, shrunk to the limit of 56 x 56 pixels: four.
        assert process.ask(batch(engine), options).timeline.image_tokens == 4


def leave_memory(process: ProcessEngine, size: int) -> None:
    """Let a process that has loaded its model have `size` bytes more of address space."""
    process.facts()
    pid = process._process.pid
    (used,) = re.findall(r"^VmSize:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (int(used) * 1024 + size, limits[1]))


@pytest.mark.slow
def test_running_out_of_memory_is_a_result_and_the_process_goes_on(qwen: Path, fresh_workers: None) -> None:
    options = Options(attn_implementation="eager", threads=1)
    with ProcessEngine(qwen, options) as process:
        leave_memory(process, 1_000_000_000)
        processor = load_processor(qwen)
        # Eager attention makes every pair of tokens: 32 x 4 heads x 2000 x 2000 x 4 bytes.
        large = made_up(processor, prompt_tokens=2000, max_new_tokens=2, batch_size=32).batch(0)
        with pytest.raises(OutOfMemoryError, match="out of memory with a batch of 32"):
            process.ask(large, options)
        small = made_up(processor, prompt_tokens=200, max_new_tokens=2).batch(0)
        assert process.ask(small, options).timeline.output_tokens == 2


@pytest.mark.parametrize("given", [{}, {"path": "p", "live": (None, None)}, {"url": "http://x", "live": (1, 2)}])
def test_an_arm_names_one_thing(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="name one of a folder, an endpoint or a live model"):
        open_engine(Arm(name="a", **given))


def test_compiled_arms_with_other_sdpa_kernels_share_no_process(qwen: Path) -> None:
    def engines(live: Any, **settings: Any) -> int:
        place = {"live": live} if live else {"path": qwen}
        kernels: tuple[Any, ...] = (None, "math")
        options = [Options(cache_implementation="static", sdpa_backend=one, **settings) for one in kernels]
        return len({Arm(name="a", options=each, **place).engine_key for each in options})

    assert engines(None, compiled=True) == 2
    assert engines(None, compiled=False) == 1
    assert engines((object(), None), compiled=True) == 1


def test_the_processor_is_the_first_arms_or_its_bases(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor, _ = load_model(qwen)
    parameters = model.num_parameters()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert processor_of([Arm(name="far", url="http://nowhere")]) is None
    found = processor_of([Arm(name="far", url="http://nowhere"), Arm(name="adapter", path=tmp_path / "adapter")])
    assert type(found) is type(processor)
    with ProcessEngine(tmp_path / "adapter", Options()) as process:
        assert process.facts().parameters > parameters  # the adapter beside its base
        request = Request(messages=[{"role": "user", "content": "?"}])
        answer = process.ask(traffic_of([request], max_new_tokens=3).batch(0), Options())
        assert answer.timeline.output_tokens == 3
