"""The features of distinct images, repeated for their copies; in a module of its own since it needs torch."""

from __future__ import annotations

from typing import Any

import torch

Spans = tuple[tuple[int, int], ...]


class _Repeat(torch.autograd.Function):
    """A function that joins the rows `spans` of the features, the same rows as often as they are named.

    The backward adds the copies' gradients in their order and in float32 at least, and rounds once: an index with
    repeats would add them by atomics in any order, in bfloat16 with a rounding for each.
    """

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, spans: Spans, dim: int) -> torch.Tensor:
        ctx.spans, ctx.dim, ctx.shape = spans, dim, features.shape
        return torch.cat([features.narrow(dim, start, end - start) for start, end in spans], dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        at = 0
        for start, end in ctx.spans:
            total.narrow(ctx.dim, start, end - start).add_(grad.narrow(ctx.dim, at, end - start))
            at += end - start
        return total.to(grad.dtype), None, None


def repeat_spans(features: torch.Tensor, spans: Spans, dim: int) -> torch.Tensor:
    """Return the rows of each span in turn, along `dim`."""
    out: torch.Tensor = _Repeat.apply(features, spans, dim)
    return out
