"""A count of attention calls, as PyTorch's own function sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.segment_attention import LOOPED_ON

if TYPE_CHECKING:
    from collections.abc import Sequence


class AttentionCalls:
    """Counts calls of `scaled_dot_product_attention` in this thread, from its making to `close`.

    Attributes:
        lengths: of the queries of each call so far.
    """

    def __init__(self) -> None:
        from torch.nn.functional import scaled_dot_product_attention
        from torch.overrides import TorchFunctionMode

        counter = self
        self.lengths: list[int] = []

        class Counting(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is scaled_dot_product_attention:
                    query = args[0] if args else kwargs["query"]
                    counter.lengths.append(int(query.shape[-2]))
                return func(*args, **(kwargs or {}))

        mode: Any = Counting()
        self._mode = mode
        mode.__enter__()

    def close(self) -> None:
        """Stop counting."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None


def calls_when_packed(lengths: Sequence[int], *, layers: int, device: str) -> int:
    """Return how many calls of a pass are left where the vision tower is packed: one a layer, or on some devices all.

    Args:
        lengths: of the queries of each call, layer after layer; every layer has all rows of the pass.
        layers: that make them.
        device: its type; see `segment_attention.LOOPED_ON`.
    """
    if device not in LOOPED_ON or not layers:
        return layers
    rows, left, layer = sum(lengths) // layers, 0, list[int]()
    for length in lengths:
        layer.append(length)
        if sum(layer) >= rows:
            left += len(layer) if len(set(layer)) > 1 else 1
            layer = []
    return left
