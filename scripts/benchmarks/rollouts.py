"""Rollouts measured: decode steps by three attentions, first tokens, whole rollouts plain against fast, in one run.

    python -m scripts.benchmarks.rollouts            # the shape of Qwen2.5-VL-3B, random weights, on a CUDA GPU
    python -m scripts.benchmarks.rollouts --tiny     # a tiny model on a CPU, where nothing is compiled: does it run?

A decode step is timed over the last steps of a `generate` call, after a first call that compiles. A first token is a
`generate` call for one token to a prompt with one image, with the tower as transformers runs it and packed. A whole
rollout is what TRL asks for: copies of prompts with one image each, sampled. Plain is TRL's call: a float32 model
under autocast, or a bfloat16 one with a LoRA adapter. Arms take turns, and the median of the rounds is printed. Each
figure is a line of JSON, and the table is last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from grpo_toolkit import DecodeAhead, inference_ready
from grpo_toolkit.model.rollouts.rollouts import FastRollouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

IMAGE, VIDEO, VISION_START, VISION_END, PAD = 151655, 151656, 151652, 151653, 151643


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The things that are measured, and their sizes."""

    text: dict[str, Any]
    vision: dict[str, Any]
    grid: int
    """Patches along either side of an image; a quarter of its square are tokens."""
    prompt_tokens: int
    new_tokens: int
    sequences: tuple[int, ...]
    images: tuple[int, ...]
    """Patches along either side of the image that a first token waits for."""
    prompts: int
    copies: int
    rounds: int


PUBLISHED = Plan(
    text={
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    vision={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
    grid=44,
    prompt_tokens=1040,
    new_tokens=128,
    sequences=(64, 16, 1),
    images=(66, 128, 256),
    prompts=8,
    copies=8,
    rounds=3,
)  # fmt: skip
TINY = Plan(
    text={
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    vision={
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    grid=8,
    prompt_tokens=48,
    new_tokens=12,
    sequences=(4, 1),
    images=(4, 8),
    prompts=2,
    copies=2,
    rounds=1,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A number of the table."""

    what: str
    arm: str
    value: float
    unit: str
    first: float
    """Of the first call, which compiles: seconds."""


def build(plan: Plan, *, dtype: torch.dtype, device: str) -> Any:
    """Return a Qwen2.5-VL with random weights, the ids of special tokens as published."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 151936, "max_position_embeddings": 128000, "tie_word_embeddings": True, **plan.text}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=plan.vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return model.to(dtype)


def batch(plan: Plan, *, prompts: int, copies: int, device: str, with_images: bool = True) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of unlike lengths, each several times, with an image each."""
    draws = torch.Generator().manual_seed(0)
    length, patches = plan.prompt_tokens, plan.grid**2
    tokens = torch.randint(1000, 100_000, (prompts, length), generator=draws)
    mask = torch.ones_like(tokens)
    for row in range(prompts):
        mask[row, : row * length // (8 * prompts)] = 0
    tokens[mask == 0] = PAD
    inputs = {"input_ids": tokens, "attention_mask": mask}
    pixels = torch.randn(prompts, patches, 1176, generator=draws)
    if with_images:
        first = min(length // 4, length - patches // 4 - 8)
        tokens[:, first - 1] = VISION_START
        tokens[:, first : first + patches // 4] = IMAGE
        inputs["mm_token_type_ids"] = (tokens == IMAGE).long()
    inputs = {name: field.repeat_interleave(copies, dim=0) for name, field in inputs.items()}
    if with_images:
        inputs["pixel_values"] = pixels.repeat_interleave(copies, dim=0).flatten(0, 1)
        inputs["image_grid_thw"] = torch.tensor([[1, plan.grid, plan.grid]]).repeat(prompts * copies, 1)
    return {name: field.to(device) for name, field in inputs.items()}


def wait(device: str) -> float:
    """Return the clock once the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_arms(plan: Plan, device: str, chosen: Sequence[str]) -> Iterator[Figure]:
    """Time a decode step, in milliseconds, at each number of sequences, by the attentions chosen (all if none is)."""
    model = build(plan, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device).eval()
    static = {"cache_implementation": "static"}
    arms: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "dynamic, sdpa": (model.generate, {}),
        "static, compiled, ahead, sdpa": (DecodeAhead(model).generate, static),
        "static, compiled, ahead, grouped": (DecodeAhead(model, grouped=True).generate, static),
    }
    for count in plan.sequences:
        inputs = batch(plan, prompts=count, copies=1, device=device, with_images=False)
        for arm, (generate, options) in arms.items():
            if chosen and arm not in chosen:
                continue
            began = wait(device)
            one_call(generate, inputs, plan, device, options)
            first = wait(device) - began
            found = [one_call(generate, inputs, plan, device, options) for _ in range(plan.rounds)]
            yield Figure(f"decode step, {count} sequences", arm, 1000 * statistics.median(found), "ms", first)
            torch.compiler.reset()  # the next arm's graphs are its own


def one_call(generate: Any, inputs: Any, plan: Plan, device: str, options: dict[str, Any]) -> float:
    """Return the seconds of a step, over all but the first eighth of a call's steps."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    seen: list[float] = []

    class Clock(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    left_out = plan.new_tokens // 8
    generate(
        **inputs, do_sample=True, max_new_tokens=plan.new_tokens, eos_token_id=None, pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([Clock()]), **options,
    )  # fmt: skip
    return (wait(device) - seen[left_out]) / (len(seen) - 1 - left_out)


def first_token_arms(plan: Plan, device: str) -> Iterator[Figure]:
    """Time the first token, in milliseconds, of a prompt with an image of each size."""
    model = build(plan, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device).eval()
    arms = {"as transformers runs it": nullcontext, "inference_ready": partial(inference_ready, packed_vision=True)}
    for side in plan.images:
        sized = replace(plan, grid=side, prompt_tokens=side**2 // 4 + 24)
        inputs = batch(sized, prompts=1, copies=1, device=device)
        found: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(plan.rounds + 1):
            for arm, around in arms.items():
                with around(model) if arm == "inference_ready" else around():
                    began = wait(device)
                    model.generate(**inputs, do_sample=False, max_new_tokens=1, pad_token_id=PAD)
                    found[arm].append(wait(device) - began)
        for arm, seconds in found.items():
            what = f"first token, an image of {side**2 // 4:,} tokens"
            yield Figure(what, arm, 1000 * statistics.median(seconds[1:]), "ms", seconds[0])


def rollout_arms(plan: Plan, device: str, kind: str) -> Iterator[Figure]:
    """Time a whole rollout, in seconds, plain and fast, of a float32 model under autocast or one with an adapter."""
    from transformers import GenerationConfig

    is_lora = kind == "LoRA"
    model = build(plan, dtype=torch.bfloat16 if is_lora else torch.float32, device=device)
    if is_lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=32, target_modules=r"(?!.*visual).*_proj", init_lora_weights=False))
    model.train()
    inputs = batch(plan, prompts=plan.prompts, copies=plan.copies, device=device)
    settings = GenerationConfig(
        max_new_tokens=plan.new_tokens, do_sample=True, eos_token_id=None, pad_token_id=PAD, disable_compile=True
    )  # fmt: skip
    found: dict[str, list[float]] = {"plain": [], "fast": []}
    rollouts: FastRollouts | None = None
    for _ in range(plan.rounds + 1):
        for arm, seconds in found.items():
            around = nullcontext() if is_lora or arm == "fast" else torch.autocast(device, torch.bfloat16)
            if arm == "plain" and rollouts is not None:
                rollouts.uninstall()
            elif arm == "fast":
                if rollouts is None:
                    rollouts = FastRollouts(model, dtype=None if is_lora else torch.bfloat16)
                else:
                    rollouts.install()
                rollouts.mark_dirty()  # as after an optimizer step: the weights are copied again
            began = wait(device)
            with around, torch.no_grad():
                model.generate(**inputs, generation_config=settings)
            seconds.append(wait(device) - began)
    for arm, seconds in found.items():
        what = f"rollout, {plan.prompts} x {plan.copies} x {plan.new_tokens}, {kind}"
        yield Figure(what, arm, statistics.median(seconds[1:]), "s", seconds[0])
    assert rollouts is not None
    assert rollouts.count == plan.rounds + 1
    rollouts.close()


def main() -> None:
    """Measure, a JSON line for each figure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--only", choices=("steps", "first", "float32", "lora"), help="one part of it")
    parser.add_argument("--sequences", type=int, nargs="+", help="of decode steps")
    parser.add_argument("--attention", nargs="+", default=(), help="of decode steps, by their names in the table")
    chosen = parser.parse_args()
    plan, device = (TINY, "cpu") if chosen.tiny else (PUBLISHED, "cuda")
    if chosen.sequences:
        plan = replace(plan, sequences=tuple(chosen.sequences))
    parts = {
        "steps": lambda: step_arms(plan, device, chosen.attention),
        "first": lambda: first_token_arms(plan, device),
        "float32": lambda: rollout_arms(plan, device, "float32 under autocast"),
        "lora": lambda: rollout_arms(plan, device, "LoRA"),
    }
    figures: list[Figure] = []
    for name, part in parts.items():
        if chosen.only in (None, name):
            for figure in part():
                figures.append(figure)
                print(json.dumps(asdict(figure)), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    width = max(len(figure.what) for figure in figures)
    print()
    for figure in figures:
        print(
            f"{figure.what:{width}}  {figure.arm:32}  {figure.value:8.2f} {figure.unit:2}  first {figure.first:6.1f} s"
        )


if __name__ == "__main__":
    main()
