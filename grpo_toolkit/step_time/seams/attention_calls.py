"""A count of attention calls, as PyTorch's own function sees them."""

from __future__ import annotations

from typing import Any


class AttentionCalls:
    """Counts calls of `scaled_dot_product_attention` in this thread, from its making to `close`.

    Attributes:
        count: calls so far.
    """

    def __init__(self) -> None:
        from torch.nn.functional import scaled_dot_product_attention
        from torch.overrides import TorchFunctionMode

        counter = self
        self.count = 0

        class Counting(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                counter.count += func is scaled_dot_product_attention
                return func(*args, **(kwargs or {}))

        mode: Any = Counting()
        self._mode = mode
        mode.__enter__()

    def close(self) -> None:
        """Stop counting."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
