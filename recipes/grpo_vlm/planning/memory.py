"""The GPU memory that a run will need, from its shapes, before any weights load.

What stays is exact: weights, gradients and optimizer states are counted on the model built without memory (`meta`),
adapter included. What comes and goes is counted per token: with gradient checkpointing a layer keeps its input, and
the widest moment is the recomputation of one layer. The bytes per token were measured by adding up the storages that
PyTorch allocates in two steps of Qwen2.5-VL's layers (torch 2.15, transformers 5.23), with the intermediate and hidden
sizes varied one at a time. A training is at its peak either there, or in the prefill of its rollouts.

An allocator keeps more than it hands out, and CUDA itself takes some: `Estimate.needed` adds both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from grpo_toolkit import InputError, RolloutSize, rollout_size, unsharded_models

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 2**30

MARGIN, CONTEXT = 1.1, 0.6 * GIB
"""On top of an estimate: the peaks measured were up to 9% above it (docs/benchmarks/recipe.md), the allocator cannot
hand out all that it keeps, and CUDA's own context takes some bytes."""

OPTIMIZER_BYTES: dict[str, float] = {
    "adamw_torch": 12.0,  # Two moments, and without fusing one more copy while it takes the roots.
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2.1,
    "adamw_bnb_8bit": 2.1,
    "paged_adamw_8bit": 0.0,
    "adafactor": 0.1,
    "sgd": 0.0,
}
"""Bytes of state per trained parameter in float32; an optimizer that is not here is counted as Adam."""

Sharing = Literal["none", "ddp", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """The bytes that come and go with each token of a batch, per unit of intermediate and of hidden size."""

    intermediate: float
    hidden: float


FORWARD, BACKWARD = PerToken(intermediate=6, hidden=8), PerToken(intermediate=10, hidden=40)
LORA_FORWARD, LORA_BACKWARD = PerToken(intermediate=8, hidden=8), PerToken(intermediate=14, hidden=32)
LORA_ROLLOUT = PerToken(intermediate=12, hidden=8)
"""PEFT casts each adapted layer's input to the adapter's float32, hence more than without; and its `generate` goes
around the forward that autocast wraps, so in rollouts the adapter's own results are float32 too."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model with its adapter. Counts are of parameters, `stored_bytes` of each in the model's files."""

    parameters: int
    vision_parameters: int
    trained: int
    hidden_size: int
    intermediate_size: int
    layers: int
    layer_parameters: int
    embedding_parameters: int
    rollouts: RolloutSize
    stored_bytes: int = 2
    vision_hidden_size: int = 0
    vision_intermediate_size: int = 0
    vision_layers: int = 0
    adapted_modules: int = 0
    adapted_vision_modules: int = 0

    @property
    def is_adapter(self) -> bool:
        return self.adapted_modules > 0


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work of one GPU: tokens of the longest prompt (its image included) and completion, and completions.

    `rollout_prompts` are the different ones in a rollout, None for as many as completions.
    """

    prompt_tokens: int
    image_patches: int
    completion_tokens: int
    training_batch: int
    rollout_batch: int
    rollouts_elsewhere: bool = False
    rollout_prompts: int | None = None

    @property
    def training_tokens(self) -> int:
        return self.training_batch * (self.prompt_tokens + self.completion_tokens)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The bytes on one GPU. `parts` stay for the whole run, of `moments` only the largest counts.

    `share` is what vLLM takes of a GPU that is not known, 0 to 1, so that neither counts it; with `sleeps` while it
    answers alone.
    """

    parts: Mapping[str, float]
    moments: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.0
    sleeps: bool = False

    @property
    def allocated(self) -> float:
        """The bytes that `torch.cuda.max_memory_allocated` should show."""
        return sum(self.parts.values()) + max(self.moments.values(), default=0.0)

    @property
    def needed(self) -> float:
        """The bytes that must be free."""
        return MARGIN * self.allocated + CONTEXT

    def smallest_gpu(self, vllm_bytes: float) -> float:
        """Return the bytes of the smallest GPU with room for all this and vLLM's share of it; infinity where none has.

        `vllm_bytes` is what the share must hold. A plan made with that GPU at hand finds the same.
        """
        if not self.share:
            return self.needed
        beside = MARGIN * (sum(self.parts.values()) if self.sleeps else self.allocated) + CONTEXT
        left = 1 - MARGIN * self.share
        return max(self.needed, vllm_bytes / self.share, beside / left if left > 0 else float("inf"))


def measure_model(name: str, *, revision: str | None = None, peft_config: Any = None) -> ModelSize:
    """Build the model without memory and count.

    Raises:
        InputError: the adapter's targets name no module of the model, or its ends in a way that cannot be trained or
            exported, or it is no model that writes text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name, revision=revision)
    mappings = (AutoModelForImageTextToText._model_mapping, AutoModelForCausalLM._model_mapping)
    model_class = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if model_class is None:
        raise InputError(f"model {name}: {type(config).__name__} belongs to no model that writes text")
    with unsharded_models(), torch.device("meta"):
        model = model_class(config)
    parameters = {key: value.numel() for key, value in model.named_parameters()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names: list[str] = []
    trained = sum(parameters.values())
    if peft_config is not None:
        from peft import get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        try:
            adapted = get_peft_model(model, peft_config)
        except ValueError as error:
            raise InputError(
                f"--lora_target_modules: {str(error).splitlines()[0]} (one name alone is a pattern for the whole "
                "path: '.*language_model.*\\.q_proj')"
            ) from error
        if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
            raise InputError(
                "--lora_target_modules: they hit the output layer (lm_head), whose weight TRL multiplies by directly, "
                "so that its adapter would never be trained; leave lm_head out"
            )
        ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
        if tied and any(isinstance(end, ModulesToSaveWrapper) for end in ends):
            raise InputError(
                "--lora_modules_to_save: the base ties lm_head to embed_tokens, and a copy of either would untie "
                "them, so nothing could be exported; leave both out"
            )
        names = [key for key, _ in adapted.named_modules() if key.endswith("lora_A.default")]
        trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    embedding = model.get_input_embeddings().weight.numel()
    vision_parameters = sum(count for key, count in parameters.items() if _is_vision(key))
    language = sum(parameters.values()) - vision_parameters - embedding
    return ModelSize(
        parameters=sum(parameters.values()),
        vision_parameters=vision_parameters,
        trained=trained,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        layers=text.num_hidden_layers,
        layer_parameters=language // text.num_hidden_layers,
        embedding_parameters=embedding,
        rollouts=rollout_size(model),
        stored_bytes=config.dtype.itemsize if config.dtype is not None else 4,
        vision_hidden_size=getattr(vision, "hidden_size", 0),
        vision_intermediate_size=getattr(vision, "intermediate_size", 0),
        vision_layers=getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 0),
        adapted_modules=len(names),
        adapted_vision_modules=sum(_is_vision(key) for key in names),
    )


def estimate(
    size: ModelSize,
    load: Load,
    *,
    weight_bytes: float,
    mixed_precision: bool,
    optimizer: str,
    sharing: Sharing = "none",
    processes: int = 1,
    reshards: bool = True,
    reserved: float = 0.0,
    share: float = 0.0,
    sleeps: bool = False,
    fast_rollouts: bool = False,
) -> Estimate:
    """Estimate the bytes that one GPU needs.

    Args:
        size (`ModelSize`):
            The model.
        load (`Load`):
            The work of one GPU.
        weight_bytes (`float`):
            Of a weight as loaded: 4 for float32, 2 for bfloat16, about 0.6 for 4 bits.
        mixed_precision (`bool`):
            Whether forwards run in bfloat16 under autocast.
        optimizer (`str`):
            `optim` of the training arguments.
        sharing (`str`, *optional*):
            How weights, gradients and optimizer are shared out among the processes.
        processes (`int`, *optional*):
            Among how many.
        reshards (`bool`, *optional*):
            Whether FSDP gives each layer's weights back after its forward, instead of keeping all until the backward.
        reserved (`float`, *optional*):
            Bytes that vLLM keeps on the same GPU.
        share (`float`, *optional*):
            Instead, what it keeps of a GPU that is not known, 0 to 1.
        sleeps (`bool`, *optional*):
            Whether it gives them back while the training needs them.
        fast_rollouts (`bool`, *optional*):
            Whether rollouts are those of `FastRolloutCallback`.
    """
    shared_weights = processes if sharing in ("fsdp", "zero3") else 1
    shared_rest = processes if sharing in ("fsdp", "zero2", "zero3") else 1
    deepspeed = sharing in ("zero2", "zero3")
    trained_bytes = 4 if size.is_adapter or deepspeed else weight_bytes
    frozen = size.parameters if size.is_adapter else 0

    weights = frozen * weight_bytes + size.trained * (2 if deepspeed else trained_bytes)
    # DDP keeps a second copy of the gradients in its buckets.
    gradients = size.trained * trained_bytes * (2 if sharing == "ddp" else 1)
    states = size.trained * OPTIMIZER_BYTES.get(optimizer, 8.0) * trained_bytes / 4
    if deepspeed:
        states += size.trained * 4  # its float32 master weights
    parts = {
        "weights": weights / shared_weights,
        "gradients": gradients / shared_rest,
        "optimizer": states / shared_rest,
    }
    if reserved and not sleeps:
        parts["vLLM"] = reserved
    gathered = 0.0
    if shared_weights > 1:  # in bfloat16: the embedding and two layers at a time, or all
        at_once = size.embedding_parameters + 2 * size.layer_parameters
        gathered = 2.0 * (at_once if reshards else size.parameters)

    # Autocast keeps the bfloat16 copy of every trained float32 weight until the forward ends.
    casts = 2.0 * (size.parameters - size.embedding_parameters) if mixed_precision and weights_cast(
        size, weight_bytes, shared_weights, deepspeed
    ) else 0.0  # fmt: skip
    if fast_rollouts:
        parts["fast rollouts"] = size.rollouts.kept_bytes(
            rows=load.rollout_batch,
            tokens=load.prompt_tokens + load.completion_tokens,
            weight_bytes=2 if deepspeed and mixed_precision else weight_bytes,
            computed_bytes=2 if mixed_precision else None,
            gathered=shared_weights > 1,
        )
    residual = 4 if weight_bytes == 4 and not deepspeed and shared_weights == 1 else 2
    moments = {"training": gathered + _training(size, load, casts=casts, residual=residual)}
    if reserved and sleeps:
        moments["rollouts"] = reserved
    if not load.rollouts_elsewhere:
        whole = 2.0 * size.parameters if sharing == "zero3" else gathered
        prefilled = _fast_rollouts(size, load) if fast_rollouts else _rollouts(size, load, casts=casts)
        moments["rollouts"] = whole + prefilled
    return Estimate(parts=parts, moments=moments, share=share, sleeps=sleeps)


def weights_cast(size: ModelSize, weight_bytes: float, shared_weights: int, deepspeed: bool) -> bool:
    """Return whether autocast has float32 weights to cast: not an adapter's base, nor what arrives in bfloat16."""
    return weight_bytes == 4 and not size.is_adapter and shared_weights == 1 and not deepspeed


def _training(size: ModelSize, load: Load, *, casts: float, residual: float) -> float:
    tokens = load.training_tokens
    patches = load.training_batch * load.image_patches
    forward, backward = (LORA_FORWARD, LORA_BACKWARD) if size.is_adapter else (FORWARD, BACKWARD)
    kept = float(tokens * size.layers * size.hidden_size * residual)
    if not size.is_adapter:  # A frozen vision tower keeps nothing.
        kept += 2.0 * patches * size.vision_layers * size.vision_hidden_size
    at_forward = casts + tokens * _bytes(forward, size.intermediate_size, size.hidden_size)
    at_backward = max(
        2.0 * size.layer_parameters * bool(casts)
        + tokens * _bytes(backward, size.intermediate_size, size.hidden_size),
        # The output layer's gradient is added up in float32, whatever the weights are in.
        0.0 if size.is_adapter else 4.0 * size.embedding_parameters,
    )
    return _pixels(load) + kept + max(at_forward, at_backward)


def _rollouts(size: ModelSize, load: Load, *, casts: float) -> float:
    per_token = LORA_ROLLOUT if size.is_adapter else FORWARD
    prompts = load.rollout_batch * load.prompt_tokens
    patches = load.rollout_batch * load.image_patches
    kv = 2.0 * size.rollouts.kv_values_per_token
    seeing = patches * _bytes(FORWARD, size.vision_intermediate_size, size.vision_hidden_size)
    prefill = prompts * (kv + _bytes(per_token, size.intermediate_size, size.hidden_size))
    decoding = load.rollout_batch * (load.prompt_tokens + load.completion_tokens) * kv
    # The trainer lets go of the last step's rollouts when it has the next ones.
    return 2 * _pixels(load) + casts + max(seeing, prefill, decoding)


def _fast_rollouts(size: ModelSize, load: Load) -> float:
    """Count the prefill of the different prompts, without an adapter; the cache for decoding is kept."""
    rows = load.rollout_prompts or load.rollout_batch
    seeing = rows * load.image_patches * _bytes(FORWARD, size.vision_intermediate_size, size.vision_hidden_size)
    kv = 2.0 * size.rollouts.kv_values_per_token
    prefill = rows * load.prompt_tokens * (kv + _bytes(FORWARD, size.intermediate_size, size.hidden_size))
    return 2 * _pixels(load) + max(seeing, prefill)


def _bytes(per_token: PerToken, intermediate: int, hidden: int) -> float:
    return per_token.intermediate * intermediate + per_token.hidden * hidden


def _pixels(load: Load) -> float:
    """Count the patches of all rollouts, which wait on the GPU: 3 channels, 2 frames, 14 x 14 pixels in float32."""
    return load.rollout_batch * load.image_patches * 3 * 2 * 14 * 14 * 4.0


def _is_vision(name: str) -> bool:
    return "visual" in name or "vision" in name
