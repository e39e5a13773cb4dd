"""Fast rollouts: the logits of every step are those of plain `generate`, and what is not known goes the plain way."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.rollouts import rollouts
from grpo_toolkit.model.rollouts.rollout_size import needed_bytes
from grpo_toolkit.model.rollouts.rollouts import FastRollouts, rollouts_of
from grpo_toolkit.model.rollouts.supported import why_plain, why_unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="fast rollouts ask for transformers 5.24"
)

SIZES = ((56, 56), (56, 56), (84, 56), (84, 56), (84, 56), (112, 84))
"""Pixels of six images: two copies of a prompt, three, and one, as where a group is cut off by the end of a batch."""


class Recorder:
    """A logits processor that keeps the scores of every step."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores.append(scores.clone())
        return scores


def settings(**changes: Any) -> Any:
    """Return the settings of a rollout as TRL makes them: `disable_compile`, sampling."""
    from transformers import GenerationConfig

    values = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    return GenerationConfig(**(values | changes))


def batch(processor: Any, *, sizes: Any = SIZES) -> dict[str, torch.Tensor]:
    """Left-padded prompts, one image each; rows with one size of image are copies, others differ in length too."""
    from PIL import Image

    kinds = sorted(set(sizes))
    texts, images = [], []
    for size in sizes:
        words = "What is number 1? " * (1 + 2 * kinds.index(size))
        content = [{"type": "image"}, {"type": "text", "text": words}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        images.append([Image.new("RGB", size, (90, 40 * kinds.index(size), 30))])
    return dict(processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))


def text_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (5, 11), generator=torch.Generator().manual_seed(0))
    ids[3] = ids[0]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[3, :2] = 0  # the tokens of row 0, another mask
    ids[2], mask[2] = ids[1], mask[1]
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, inputs: dict[str, Any], config: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of every step, plain and as they come from the model's `generate` now."""
    found: list[torch.Tensor] = []
    for generate in (type(model).generate.__get__(model), model.generate):
        recorder = Recorder()
        generate(**inputs, generation_config=config or settings(), logits_processor=[recorder])
        found.append(torch.stack(recorder.scores).clamp(min=-1e4))
    return found[0], found[1]


@pytest.fixture
def fast() -> Iterator[Callable[..., FastRollouts]]:
    """Make `FastRollouts` that let go of their models after the test."""
    made: list[FastRollouts] = []

    def make(model: Any, **options: Any) -> FastRollouts:
        made.append(FastRollouts(model, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_every_steps_logits_are_those_of_plain_generate(qwen: Path, fast: Any) -> None:
    model, processor, _ = load_model(qwen)
    inputs = batch(processor)
    assert inputs["attention_mask"].sum(-1).unique().numel() == 3  # ragged
    rolled = fast(model)
    for seed in range(2):  # the second in the first one's cache
        torch.manual_seed(seed)
        plain, ours = both(model, inputs)
        assert (plain - ours).abs().max() < 1e-5
        inputs = {name: field.flip(0) if field.shape[0] == 6 else field for name, field in inputs.items()}
        sizes = inputs["image_grid_thw"].flip(0).prod(-1).tolist()
        inputs["pixel_values"] = torch.cat(inputs["pixel_values"].split(sizes)[::-1])
    assert (rolled.count, rolled.prefilled) == (2, 6)


@pytest.mark.parametrize("dropped", ["mask", "rope_deltas", "rows"])
def test_that_test_fails_where_something_is_dropped(
    qwen: Path, fast: Any, monkeypatch: pytest.MonkeyPatch, dropped: str
) -> None:
    """A tiny model emits one token over and over, so equal tokens would prove nothing."""
    model, processor, _ = load_model(qwen)
    whole = rollouts.prefill

    def prefill(copied: Any, rows: Any) -> Any:
        if dropped == "mask":
            rows.inputs["attention_mask"] = torch.ones_like(rows.inputs["attention_mask"])
        cache = whole(copied, rows)
        if dropped == "rope_deltas":
            copied.model.rope_deltas = torch.zeros_like(copied.model.rope_deltas)
        if dropped == "rows":
            rows.index[1] = 2
        return cache

    monkeypatch.setattr(rollouts, "prefill", prefill)
    fast(model)
    plain, ours = both(model, batch(processor))
    assert (plain - ours).abs().max() > (2e-3 if dropped == "rope_deltas" else 0.1)


def test_families_with_and_without_pictures(any_base: Path, fast: Any) -> None:
    model, processor, _ = load_model(any_base)
    has_pictures = hasattr(processor, "image_processor")
    rolled = fast(model)
    plain, ours = both(model, batch(processor) if has_pictures else text_batch())
    assert (plain - ours).abs().max() < 1e-5
    assert rolled.prefilled == (3 if has_pictures else 4)


@pytest.mark.parametrize("window", [6, 12, 40])
def test_sliding_windows(window: int, fast: Any) -> None:
    """Shorter than the prompt, than prompt and completion, and longer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=window, max_window_layers=1,
        initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    fast(model)
    for _ in range(2):
        plain, ours = both(model, text_batch(), settings(max_new_tokens=9, min_new_tokens=9))
        assert (plain - ours).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_is_compiled_once_for_a_bucket(qwen: Path, fast: Any, dtype: Any) -> None:
    """Without a break in its graph: other prompts, other lengths and other weights run what was compiled."""
    from transformers import CompileConfig

    torch.compiler.reset()  # what other tests have compiled decides what is compiled again
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, processor, _ = load_model(qwen)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    rolled = fast(model, dtype=dtype)
    rolled.compile_config = config
    compiled = []
    for sizes in (SIZES, SIZES[:4] + SIZES[1:3], SIZES[:1] * 6):
        plain, ours = both(model, batch(processor, sizes=sizes))
        # Logits are some 30 wide, and rounded twenty times on their way in bfloat16.
        assert (plain - ours)[:1].abs().max() < (1e-5 if dtype is None else 2)
        compiled.append(len(graphs))
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1.5)
        rolled.mark_dirty()
    assert compiled == [1, 1, 1]
    assert rolled.count == 3


def test_live_modules_do_not_run_in_a_rollout(qwen: Path, fast: Any) -> None:
    """Their hooks would break a compiled forward, and train mode and checkpointing change it."""
    model, processor, _ = load_model(qwen)
    model.train()
    model.gradient_checkpointing_enable()
    seen: list[Any] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
    fast(model)
    before = copy.deepcopy(model.state_dict())
    model.generate(**batch(processor), generation_config=settings())
    assert seen == []
    assert model.training
    assert model.model.rope_deltas is None
    assert model.config.text_config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_rollouts_are_taken(qwen: Path, fast: Any) -> None:
    model, processor, _ = load_model(qwen)
    inputs = batch(processor)
    said: list[str] = []
    rolled = fast(model, on_plain=said.append)
    model.generate(**inputs, max_new_tokens=2)
    model.generate(**inputs, generation_config=settings(disable_compile=False))
    assert (rolled.count, said) == (0, [])
    model.generate(**inputs, generation_config=settings(num_beams=2))
    model.generate(**inputs, generation_config=settings(use_cache=False))
    model.generate(**inputs, generation_config=settings(num_return_sequences=2, do_sample=True))
    model.generate(**inputs, generation_config=settings(return_dict_in_generate=True))
    assert why_plain(inputs | {"generation_config": settings(cache_implementation="quantized")}) is not None
    assert said == [
        "beam_search",
        "use_cache=False, cache_implementation=None",
        "num_return_sequences",
        "return_dict_in_generate",
    ]
    assert rolled.count == 0


def test_a_failure_is_told_once_and_the_rollout_is_plain(
    qwen: Path, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, _ = load_model(qwen)
    inputs = batch(processor)
    plain = model.generate(**inputs, generation_config=settings())
    failures: list[Exception] = []
    rolled = fast(model, on_failure=failures.append)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(rollouts, "prefill", fail)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, generation_config=settings()), plain)
    assert [str(error) for error in failures] == ["no room"]
    assert rolled.count == 0
    assert rollouts_of(model) is None
    assert "generate" not in vars(model)


def test_a_deep_copy_of_the_model_answers_for_itself(qwen: Path, fast: Any) -> None:
    model, processor, _ = load_model(qwen)
    inputs = batch(processor)
    rolled = fast(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.neg_()
    assert not torch.equal(
        twin.generate(**inputs, generation_config=settings()), model.generate(**inputs, generation_config=settings())
    )
    assert rolled.count == 1
    assert rollouts_of(twin) is None


def test_nothing_is_left_of_a_training_that_crashed(qwen: Path) -> None:
    model, processor, _ = load_model(qwen)
    rolled = FastRollouts(model)
    model.generate(**batch(processor), generation_config=settings())
    assert rolled.count == 1
    left = weakref.ref(model)
    del model, rolled
    gc.collect()
    assert left() is None


def test_first_tokens_are_drawn_from_the_same_distribution(qwen: Path, fast: Any) -> None:
    """With temperature, top-k, a repetition penalty and suppressed tokens: chi-square over 4,000 first tokens."""
    from scipy.stats import chi2_contingency

    model, processor, _ = load_model(qwen)
    one = batch(processor, sizes=SIZES[:1])
    inputs = {name: field.repeat(2000, *[1] * (field.ndim - 1)) for name, field in one.items()}
    rolled = fast(model)
    config = settings(
        max_new_tokens=1, min_new_tokens=1, do_sample=True, temperature=4.0, top_k=12, repetition_penalty=1.2,
        suppress_tokens=[int(one["input_ids"][0, -1])],
    )  # fmt: skip
    torch.manual_seed(0)
    short = {name: field[: field.shape[0] // 10] for name, field in inputs.items()}
    plain = torch.cat([type(model).generate(model, **short, generation_config=config)[:, -1] for _ in range(10)])
    ours = model.generate(**inputs, generation_config=config)[:, -1]
    assert rolled.prefilled == 1
    tokens = torch.cat([plain, ours]).unique()
    counts = [[int((drawn == token).sum()) for token in tokens] for drawn in (plain, ours)]
    assert len(tokens) == 12
    assert chi2_contingency(counts).pvalue > 1e-3
    shifted = [counts[0], counts[1][1:] + counts[1][:1]]
    assert chi2_contingency(shifted).pvalue < 1e-3  # it can fail


def test_what_cannot_go_the_fast_way_is_told_by_its_reason(qwen: Path, tmp_path: Path) -> None:
    from transformers import (
        FalconH1Config,
        FalconH1ForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    model = load_model(qwen)[0]
    assert why_unsupported(model) is None
    model.config.text_config._attn_implementation = "flex_attention"
    assert why_unsupported(model) == "its attention is flex_attention"
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **heads))
    assert why_unsupported(gemma) == "its attention scores are capped"
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    assert why_unsupported(t5) == "it has an encoder and a decoder"
    falcon = FalconH1ForCausalLM(FalconH1Config(**small, **heads, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8))
    assert why_unsupported(falcon) is not None


def test_the_room_that_is_needed() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    weights = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * 2 * 2 * 8 * 2 * 16 * 1536  # keys and values, layers, heads, dim, bytes, rows, slots
    assert needed_bytes(model, torch.bfloat16, rows=16, new_tokens=128) == (
        2 * weights + cache + 3 * 4 * weights + 1_000_000_000
    )
    model.requires_grad_(False)
    assert needed_bytes(model, None, rows=16, new_tokens=128) == 2 * cache + 1_000_000_000
