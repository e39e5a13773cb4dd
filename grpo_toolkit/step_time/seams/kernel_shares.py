"""What a device spends a micro-batch's time on: matrix products, attention, and what lies between them.

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
    by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ("products", "attention", "between")}
    exchange = []
    for one in spans:
        if _EXCHANGE.search(one.name):
            exchange.append((one.begin, one.end))
        else:
            by_kind[_kind_of(one.name)].append((one.begin, one.end))
    shares, known, before = {}, [], 0.0
    for kind, times in [*by_kind.items(), ("exchange", exchange)]:
        known += times
        until = covered(known) / 1e6 / wall_s
        shares[kind], before = until - before, until
    return KernelsSeen(**shares, idle=max(1.0 - before, 0.0))


def _kind_of(name: str) -> str:
    return "attention" if _ATTENTION.search(name) else "products" if _PRODUCTS.search(name) else "between"
