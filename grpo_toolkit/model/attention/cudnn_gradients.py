"""A fault of cuDNN's attention that ends a training: gradients that are no numbers.

PyTorch's SDPA prefers cuDNN on Hopper. With a mask, and at lengths that leave 64 when divided by 128, its backward
returns NaN for the queries of rows that see no key, as the padded positions of a prompt do (PyTorch's issue 196678,
TRL's 7181). One length in 128 is such; the loss of its step is fine, and after its update every weight is NaN. Other
kernels are right at these lengths. Figures: docs/benchmarks/training.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.decode_without_cudnn import CudnnSwitch
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    import torch

TILE, REST = 128, 64
PROBED = TILE + REST
"""Tokens of the attention that is tried: the shortest of such lengths beyond one tile."""


def loses_gradients(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether SDPA's gradients are NaN here at such a length: one small call on the device finds out.

    Zeros with a causal mask whose first rows see nothing: right gradients are zero. No random number is drawn. CPUs
    are not asked, nor is float32, which cuDNN's attention does not take.
    """
    import torch

    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    backends: Any = torch.backends.cuda
    if not backends.cudnn_sdp_enabled():
        return False
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        query, key, value = (
            torch.zeros(1, 2, PROBED, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        mask = torch.ones(PROBED, PROBED, device=device, dtype=torch.bool).tril()
        mask[:REST] = False
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None])
        found = torch.autograd.grad(attended.float().sum(), (query, key, value))
    return not all(bool(torch.isfinite(gradient).all()) for gradient in found)


class GradientsWithoutCudnn:
    """Hooks that keep forwards at lengths whose gradients would be NaN off cuDNN's attention.

    The switch is one of the process, and stays as such a forward has set it until `end_of_step`: what checkpointing
    computes again in the backward pass must go the same way. Forwards that want no gradient decide nothing.

    Args:
        model: the model in training.
        is_compiled: whether torch.compile has its forward, which hooks would make stop and start. Then there are none,
            and the switch is off from here to `close`, at every length.
    """

    def __init__(self, model: torch.nn.Module, *, is_compiled: bool = False) -> None:
        self._cudnn = CudnnSwitch()
        self._is_compiled = is_compiled
        self._hooks = LookingHooks("keeping gradients off cuDNN's attention", put_back=self._cudnn.back)
        if is_compiled:
            self._cudnn.off()
            return
        inner = base_model(model)
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        self._hooks.before(inner if decoder is None else decoder, self._before)

    def close(self) -> None:
        """Take the hooks off the model and put the switch back."""
        self._hooks.close()

    def end_of_step(self) -> None:
        """Let cuDNN's attention in again, unless it is off at every length: this step's backward passes are over."""
        if not self._is_compiled:
            self._cudnn.back()

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        if not torch.is_grad_enabled():
            return
        tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        if tokens is None:
            tokens = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tokens is not None and tokens.shape[1] % TILE == REST:
            self._cudnn.off()
