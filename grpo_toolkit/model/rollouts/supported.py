"""The conditions of the fast way: of models, and of single calls. No clock decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rollouts import static_caches
from grpo_toolkit.model.rollouts.weights_copy import why_no_copy
from grpo_toolkit.model.sharding.gather import is_fsdp1

if TYPE_CHECKING:
    import torch

OLDEST: Final = "5.24"
"""The first transformers whose `generate` goes on from a static cache as it is done here."""

HANDED_ON: Final = ("logits_processor", "stopping_criteria", "streamer", "tokenizer")
"""Arguments of `generate` that are those of the decode steps alone."""


def why_unsupported(model: torch.nn.Module) -> str | None:
    """Return why a model's rollouts cannot go the fast way, in a few words; None where they can."""
    import transformers
    from packaging.version import Version
    from transformers.generation.utils import GenerationMixin

    if Version(transformers.__version__) < Version(OLDEST):
        return f"transformers {transformers.__version__} is older than {OLDEST}"
    inner: Any = base_model(model)
    kind = type(inner)
    text = inner.config.get_text_config(decoder=True)
    if is_fsdp1(model):
        return "the first FSDP keeps the weights"
    if any(_is_offloaded(parameter) for parameter in model.parameters()):
        return "the weights lie on the CPU between two steps"
    if inner.config.is_encoder_decoder:
        return "it has an encoder and a decoder"
    if not kind._can_compile_fullgraph or kind._prepare_static_cache is not GenerationMixin._prepare_static_cache:
        return f"{kind.__name__} has no plain static cache"
    if hasattr(inner, "create_masks_for_generate"):
        return f"{kind.__name__} makes masks of its own, which a static cache drops"
    if any("softcap" in name and value for name, value in vars(text).items()):
        return "its attention scores are capped"
    if text._attn_implementation not in ("sdpa", "eager", "flash_attention_2"):
        return f"its attention is {text._attn_implementation}"
    if not static_caches.supports(inner):
        return "it has layers without a cache of keys and values"
    return why_no_copy(model)


def _is_offloaded(parameter: Any) -> bool:
    """Return whether a sharded parameter is not where it is computed with."""
    if hasattr(parameter, "ds_tensor"):
        return str(parameter.ds_tensor.device.type) != str(parameter.device.type)
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and parameter.device.type != mesh.device_type


def why_plain(call: dict[str, Any]) -> str | None:
    """Return what in one call of `generate` is not done the fast way, in a few words; None where nothing is."""
    import torch

    config = call["generation_config"]
    unknown = [name for name, value in call.items() if name not in ("generation_config", "synced_gpus", *HANDED_ON)]
    unknown = [name for name in unknown if call[name] is not None and not isinstance(call[name], torch.Tensor)]
    if unknown:
        return f"an argument {unknown[0]}"
    tokens, mask = call.get("input_ids"), call.get("attention_mask")
    if tokens is None or mask is None or mask.shape != tokens.shape or call.get("inputs_embeds") is not None:
        return "a call without input_ids and their attention_mask"
    if tokens.shape[1] < 2 or not bool(mask[:, -1].all()):
        return "prompts of one token, or padded on the right"
    mode = config.get_generation_mode().value
    if mode not in ("sample", "greedy_search"):
        return f"{mode}"
    if (config.num_return_sequences or 1) > 1:
        return "num_return_sequences"
    for name in ("return_dict_in_generate", "prefill_chunk_size", "token_healing", "guidance_scale"):
        if getattr(config, name, None):
            return name
    if config.use_cache is False or config.cache_implementation not in (None, "dynamic", "static"):
        return f"use_cache={config.use_cache}, cache_implementation={config.cache_implementation}"
    return "no max_new_tokens" if config.max_new_tokens is None else None
