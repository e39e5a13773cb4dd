"""Attention over segments in one call a layer, by the kernel that fits their lengths.

transformers calls SDPA once for every segment of `cu_seqlens` unless FlashAttention is installed: 8,096 calls in one
pass of Qwen2.5-VL's tower over eight images. Here the segments stand in one batch:

* segments of one length are a view of the rows, [segments, heads, length, dim], and need no mask;
* others go one by one on a CPU, as transformers has them,
* elsewhere to `torch.nn.attention.varlen.varlen_attn` where the dtype and the GPU allow it (torch >= 2.10), or
* into a padded batch with a mask of its keys, or into a few of them where lengths differ so much that padding to the
  longest would cost more than the calls.

None of them is cuDNN's, which plans anew for every size of picture: 0.1 to 0.4 s a size in forward and backward of
Qwen2.5-VL-3B's tower on an H200. All of them compute the same sums over the same keys; figures are in the benchmarks
of packed vision.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_toolkit.model.attention.decode_without_cudnn import without_cudnn
from grpo_toolkit.model.attention.segment_plan import SegmentPlan, plan_of

if TYPE_CHECKING:
    import torch

    Kernel = Literal["batch", "varlen", "loop"]

logger = logging.getLogger(__name__)

LOOPED_ON: Final[tuple[str, ...]] = ("cpu",)
"""Devices where segments of several lengths go one by one: on a CPU a call costs little, and a batch that is gathered
and masked more (224 against 178 ms forward and backward, for the windows of two images of 1,936 patches)."""

MAX_HEAD_DIM: Final = 256
"""The largest head that FlashAttention 2's kernels take."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the segments of `cu_seq_lens_q`, or as "sdpa" does where there are none.

    This is an attention function of transformers' `AttentionInterface`: query, key and value are [1, heads, rows,
    dim], the result is [1, rows, heads, dim].
    """
    import torch

    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if cu_seq_lens_q is None:
        return _sdpa(module, query, key, value, attention_mask, options), None
    options["is_causal"] = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plan = plan_of(cu_seq_lens_q, query.device)
    if plan.rows != query.shape[2]:
        raise ValueError(f"cu_seqlens ends at {plan.rows}, but there are {query.shape[2]} rows")
    if query.shape[0] != 1 or attention_mask is not None or kwargs.get("position_bias") is not None:
        return _one_by_one(module, query, key, value, attention_mask, plan, options), None
    try:
        kernel = choose_kernel(query, key, plan, options)
        if kernel == "loop":
            return _one_by_one(module, query, key, value, None, plan, options), None
        if kernel == "varlen":
            return varlen_attention(query, key, value, plan, scaling=scaling), None
        return batch_attention(module, query, key, value, plan, options), None
    except RuntimeError as error:  # a kernel that this GPU or release lacks; the forward goes on as the library's does
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _tell_once(str(error))
        return _one_by_one(module, query, key, value, attention_mask, plan, options), None


def choose_kernel(query: torch.Tensor, key: torch.Tensor, plan: SegmentPlan, options: dict[str, Any]) -> Kernel:
    """Return the kernel for these segments: "batch" for even ones; for others what suits the device."""
    if plan.is_even:
        return "batch"
    if query.device.type in LOOPED_ON:
        return "loop"
    return "varlen" if can_use_varlen(query, key, options) else "batch"


def can_use_varlen(query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> bool:
    """Return whether `varlen_attn` takes these tensors, and computes with them what SDPA would."""
    import torch

    if query.device.type != "cuda" or not _varlen_takes_scale() or torch.are_deterministic_algorithms_enabled():
        return False
    return (
        compute_dtype(query) in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device)[0] >= 8
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= MAX_HEAD_DIM
        and query.shape[1] == key.shape[1]
        and not options.get("dropout")
        and not options["is_causal"]
        and options.get("softcap") is None
    )


@cache
def _tell_once(error: str) -> None:
    logger.warning("grpo_toolkit: attention over segments goes one by one where it failed in one call: %s", error)


@cache
def _varlen_takes_scale() -> bool:
    # torch 2.10 has the function without `scale`.
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "scale" in inspect.signature(varlen_attn).parameters


def compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the dtype that SDPA computes in: autocast lowers float32."""
    import torch

    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return query.dtype


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: SegmentPlan, *, scaling: float | None
) -> torch.Tensor:
    """Attend within segments by PyTorch's variable-length kernel: no padding, one call."""
    from torch.nn.attention.varlen import varlen_attn

    dtype, longest = compute_dtype(query), plan.longest
    # Rows first, [rows, heads, dim], which for transformers' towers is the layout in memory already.
    rows = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]
    borders = plan.cu_seqlens
    out: Any = varlen_attn(rows[0], rows[1], rows[2], borders, borders, longest, longest, scale=scaling)
    return out[None]  # type: ignore[no-any-return]


def batch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: SegmentPlan,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend within segments by SDPA over the plan's batches: one call each."""
    import torch

    if not plan.rows:
        return value.new_zeros(1, 0, query.shape[1], value.shape[-1])
    layout = plan.layout
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if layout.order is not None:
        rows = [tensor.index_select(0, layout.order) for tensor in rows]
    sizes = [batch.rows for batch in layout.batches]
    outputs = []
    for batch, *parts in zip(layout.batches, *(torch.split(tensor, sizes) for tensor in rows), strict=True):
        if batch.slots is not None:
            # Into zeros rather than by an index with repeats: the backward is then a plain gather.
            parts = [
                part.new_zeros(batch.count * batch.length, *part.shape[1:]).index_copy(0, batch.slots, part)
                for part in parts
            ]
        padded = [part.reshape(batch.count, batch.length, *part.shape[1:]).transpose(1, 2) for part in parts]
        # Causal queries see no key behind them, so none that is padding.
        mask = None if options["is_causal"] else batch.mask
        with without_cudnn(query.device):  # a picture of a new size is a new length
            out = _sdpa(module, padded[0], padded[1], padded[2], mask, options).flatten(0, 1)
        outputs.append(out if batch.slots is None else out.index_select(0, batch.slots))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (joined if layout.back is None else joined.index_select(0, layout.back))[None]


def _one_by_one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    plan: SegmentPlan,
    options: dict[str, Any],
) -> torch.Tensor:
    # As transformers does it, for what cannot be put into one batch: masks and biases that belong to a segment.
    import torch

    lengths = list(plan.lengths)
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_sdpa(module, q, k, v, attention_mask, options) for q, k, v in parts], dim=1)


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return out
