"""Shares of a micro-batch's time in which a device works on matrix products, on attention, and between them.

Kernels are told apart by their names: those of cuBLAS, CUTLASS, cuDNN, FlashAttention and NCCL on a GPU, those of
PyTorch's operations on a CPU.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.seams.device_profile import covered
from grpo_toolkit.step_time.seen import KernelsSeen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.step_time.seams.device_profile import Span

_ATTENTION: Final = re.compile(r"flash|fmha|attention|sdpa|mem_eff", re.IGNORECASE)
_PRODUCTS: Final = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|splitk|implicit_convolve|aten::(?:add|b|baddb)?mm$|aten::linear",
    re.IGNORECASE,
)
_EXCHANGE: Final = re.compile(r"nccl|c10d|all_reduce|all_gather|reduce_scatter", re.IGNORECASE)


def kernel_shares(spans: Sequence[Span], wall_s: float) -> KernelsSeen | None:
    """Return what a device spent some seconds on; None where it did nothing, or its profile has nothing of it.

    Where two kernels run beside each other, the time is the first's of: products, attention, between, exchange.
    """
    if not spans or wall_s <= 0:
        return None
    by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in _KINDS}
    for one in spans:
        by_kind[_kind_of(one.name)].append((one.begin, one.end))
    shares: dict[str, float] = {}
    known: list[tuple[float, float]] = []
    before = 0.0
    for kind, times in by_kind.items():
        known += times
        until = covered(known) / 1e6 / wall_s
        shares[kind], before = until - before, until
    return KernelsSeen(**shares, idle=max(1.0 - before, 0.0))


_KINDS: Final = ("products", "attention", "between", "exchange")


def _kind_of(name: str) -> str:
    if _EXCHANGE.search(name):
        return "exchange"
    return "attention" if _ATTENTION.search(name) else "products" if _PRODUCTS.search(name) else "between"
