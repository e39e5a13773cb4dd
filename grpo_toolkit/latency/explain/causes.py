"""The causes for which a trained model may be slower than its base: one row each, with its signs and its cure.

A cause is found without a clock, by comparing the facts of two arms. Toggling it means running the trained model with
that one thing as in the base; what the clock then says is its effect.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.explain.facts import Facts, mean

Test = Callable[[Facts, Facts], str | None]
"""(base, trained) -> what was seen, or None."""

Cured = Callable[[Options, Facts], Options]
"""(the trained arm's options, base) -> the same options with this one thing as in the base."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A cause of slowness.

    Attributes:
        name: stable, in kebab-case; `Effect.cause` holds it.
        title: in a few words.
        seen: tells from the facts of base and trained whether it is there, and what shows it.
        options: toggles it; None where it is toggled by the length of the answers or by merging, or not at all.
        cure: what to do.
        command: the command or the code for it, with {base}, {trained} and names of `blanks` in it.
        is_wrong: the text is wrong too, not only late; such a cause stands first whatever it costs.
    """

    name: str
    title: str
    seen: Test
    options: Cured | None = None
    cure: str
    command: str
    is_wrong: bool = False


def _training_state(base: Facts, trained: Facts) -> str | None:
    if not trained.is_training or base.is_training:
        return None
    if not trained.forgets:
        return "the model is in train mode"
    steps = ", ".join(map(str, trained.proof.step_lengths[:3]))
    return (
        f"the model is in train mode with gradient checkpointing; tokens fed a step: {steps}, ... on top of an empty "
        "cache: its text is wrong"
    )


def _cache_off(base: Facts, trained: Facts) -> str | None:
    if not trained.recomputes:
        return None
    steps = trained.proof.step_lengths
    seen = f"tokens fed a step: {', '.join(map(str, steps[:4]))}, ..."
    if (trained.proof.vision_calls or 0) > (base.proof.vision_calls or 0):
        seen += f"; the vision tower ran {trained.proof.vision_calls} times for {len(steps)} tokens"
    finding = trained.finding("generation-cache-off", "config-cache-off")
    seen += f"; {finding.file}: {finding.key} is not true" if finding else ""
    return seen + ("; the base decodes without a cache too, so both are slow" if base.recomputes else "")


def _offloaded(base: Facts, trained: Facts) -> str | None:
    if not trained.off_device or trained.off_device == base.off_device:
        return None
    return f"weights lie on {', '.join(trained.off_device)}, not on {trained.options.device}"


def _wider(base: Facts, trained: Facts) -> str | None:
    wide, narrow = (_BITS.get(facts.dtype, 0) for facts in (trained, base))
    if wide <= narrow:
        return None
    finding = trained.finding("wider-than-base", "dtype-disagrees")
    where = f"; {finding.file}: {finding.found}" if finding else ""
    return f"loaded as {trained.dtype}, the base as {base.dtype}{where}"


_BITS: Final = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


def _unmerged(base: Facts, trained: Facts) -> str | None:
    if not trained.declared.is_adapter or base.declared.is_adapter:
        return None
    return "an adapter runs beside its base: two more matrix products in every layer that it has"


def _pixels(base: Facts, trained: Facts) -> str | None:
    if trained.pixel_limits == base.pixel_limits or trained.pixel_limits is None:
        return None
    low, high = trained.pixel_limits
    usual = "any size" if base.pixel_limits is None else "{} to {}".format(*base.pixel_limits)
    seen = f"images of {low} to {high} pixels, in the base of {usual}"
    if trained.image_tokens != base.image_tokens:
        seen += f"; image tokens {mean(trained.image_tokens):.0f} instead of {mean(base.image_tokens):.0f}"
    return seen


def _attention(base: Facts, trained: Facts) -> str | None:
    if trained.attn_implementation == base.attn_implementation:
        return None
    return f"attention is {trained.attn_implementation}, in the base {base.attn_implementation}"


def _sdpa(base: Facts, trained: Facts) -> str | None:
    ours, theirs = (facts.options.sdpa_backend or "PyTorch's choice" for facts in (trained, base))
    return None if ours == theirs else f"SDPA runs {ours}, in the base {theirs}"


def _static(base: Facts, trained: Facts) -> str | None:
    if not trained.is_static or base.is_static:
        return None
    compiled = "compiled for one size of it" if trained.options.is_compiled else "made anew and whole for every answer"
    return f"cache_implementation is {trained.cache_implementation}: decoding is {compiled}"


def _prompt(base: Facts, trained: Facts) -> str | None:
    ours, theirs = (
        [prompt - image for prompt, image in zip(facts.prompt_tokens, facts.image_tokens, strict=True)]
        for facts in (trained, base)
    )
    if ours == theirs:
        return None
    return f"the same messages become {mean(ours):.0f} tokens of text, in the base {mean(theirs):.0f}"


def _eos(base: Facts, trained: Facts) -> str | None:
    if trained.eos_token_ids == base.eos_token_ids:
        return None
    return f"answers end at {list(trained.eos_token_ids)}, in the base at {list(base.eos_token_ids)}"


def _longer(base: Facts, trained: Facts) -> str | None:
    if trained.output_tokens == base.output_tokens:
        return None
    seen = f"answers of {mean(trained.output_tokens):.0f} tokens, in the base {mean(base.output_tokens):.0f}"
    if trained.think_tokens:
        seen += f"; {trained.think_tokens} of {sum(trained.output_tokens)} are thinking"
    if trained.capped:
        seen += f"; {trained.capped} of {len(trained.output_tokens)} ended at the cap"
    return seen


def _base_pixels(options: Options, base: Facts) -> Options:
    low, high = base.pixel_limits or (None, None)
    return replace(options, min_pixels=low, max_pixels=high)


CAUSES: Final = (
    Cause(
        name="training-state",
        title="gradient checkpointing or train mode left on",
        seen=_training_state,
        options=lambda options, _: replace(options, training=False),
        cure="leave training before generating; KVCacheCallback does it at the end of training",
        command="with grpo_toolkit.inference_ready(model): model.generate(...)",
        is_wrong=True,
    ),
    Cause(
        name="cache-off",
        title="KV cache off",
        seen=_cache_off,
        options=lambda options, _: replace(options, use_cache=True),
        cure="put use_cache back in the files",
        command="grpo-toolkit repair {trained} --base {base}",
    ),
    Cause(
        name="device-map",
        title="weights offloaded by a device map",
        seen=_offloaded,
        options=lambda options, base: replace(options, device_map=base.options.device_map),
        cure="load the whole model onto the device",
        command='from_pretrained("{trained}", device_map={{"": "{device}"}})',
    ),
    Cause(
        name="float32",
        title="wider weights than the base",
        seen=_wider,
        options=lambda options, base: replace(options, dtype=base.dtype),
        cure="store and load the base's dtype",
        command="grpo-toolkit repair {trained} --base {base} --rewrite-weights",
    ),
    Cause(
        name="unmerged-adapter",
        title="adapter not merged",
        seen=_unmerged,
        cure="merge the adapter into its base",
        command="grpo-toolkit export {trained} OUT --base {base}",
    ),
    Cause(
        name="pixel-limits",
        title="other pixel limits",
        seen=_pixels,
        options=_base_pixels,
        cure="give the processor the limits of the training, if they were the base's",
        command='AutoProcessor.from_pretrained("{trained}", min_pixels={low}, max_pixels={high})',
    ),
    Cause(
        name="attention",
        title="eager attention",
        seen=_attention,
        options=lambda options, base: replace(options, attn_implementation=base.attn_implementation),
        cure="load with the base's attention, and delete attn_implementation from config.json if it stands there",
        command='from_pretrained("{trained}", attn_implementation="{attention}")',
    ),
    Cause(
        name="sdpa-backend",
        title="another SDPA backend",
        seen=_sdpa,
        options=lambda options, base: replace(options, sdpa_backend=base.options.sdpa_backend),
        cure="leave the choice of the kernel as it was for the base",
        command="torch.backends.cuda.enable_flash_sdp(True); torch.backends.cuda.enable_mem_efficient_sdp(True)",
    ),
    Cause(
        name="static-cache",
        title="static cache compiled anew for new lengths",
        seen=_static,
        options=lambda options, base: replace(
            options, cache_implementation=base.cache_implementation, compiled=base.options.compiled
        ),
        cure="a static cache pays where lengths repeat: DecodeAhead(model, max_cache_len=N) gives all requests one, "
        "or use the dynamic cache",
        command='model.generate(..., cache_implementation="dynamic")',
    ),
    Cause(
        name="prompt",
        title="another chat template or tokenizer",
        seen=_prompt,
        cure="use the template of the training, if it was the base's; its effect is not toggled, see the prefill",
        command="grpo-toolkit doctor {trained} --base {base}",
    ),
    Cause(
        name="eos",
        title="other ends of sequence",
        seen=_eos,
        options=lambda options, base: replace(options, eos_token_ids=base.eos_token_ids or None),
        cure="put the base's eos_token_id back",
        command="grpo-toolkit repair {trained} --base {base}",
    ),
    Cause(
        name="longer-answers",
        title="answers of another length",
        seen=_longer,
        cure="shorter answers are trained, or asked for: a length penalty in the reward, a prompt without thinking",
        command="model.generate(..., max_new_tokens={tokens})",
    ),
)
"""Every cause, the gravest first."""

BY_NAME: Final = {cause.name: cause for cause in CAUSES}


def blanks(base: Facts, trained: Facts) -> dict[str, object]:
    """Return what fills the blanks of a cause's command."""
    low, high = base.pixel_limits or (None, None)
    return {
        "base": shlex.quote(str(base.path)) if base.path else "BASE",
        "trained": shlex.quote(str(trained.path)) if trained.path else "TRAINED",
        "device": trained.options.device,
        "attention": base.attn_implementation,
        "low": low,
        "high": high,
        "tokens": round(mean(base.output_tokens)),
    }
