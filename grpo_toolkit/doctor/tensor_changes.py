"""Changes of tensors: a remedy of a finding, and what all remedies of a repair come to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo, transposed_shape

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class TensorChanges:
    """Tensors that become others, by their present names; made only where weights may be rewritten.

    Attributes:
        renames: new names; None drops a tensor.
        dtypes: new dtypes.
        transposed: those whose last two dimensions change places.
    """

    renames: Mapping[str, str | None] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors that change."""
        return {*self.renames, *self.dtypes, *self.transposed}

    def then(self, later: TensorChanges) -> TensorChanges:
        """Return one change that does this one and then another, which is written in the names that this one gives."""
        names: dict[str, str | None] = {name: later.renames.get(new, new) for name, new in self.renames.items() if new}
        names |= {name: None for name, new in self.renames.items() if new is None}
        moved = set(self.renames) | {new for new in self.renames.values() if new}
        names |= {name: new for name, new in later.renames.items() if name not in moved}
        origin = {new: name for name, new in self.renames.items() if new}
        cast = dict(self.dtypes) | {origin.get(name, name): dtype for name, dtype in later.dtypes.items()}
        turned = self.transposed ^ {origin.get(name, name) for name in later.transposed}
        return TensorChanges(renames=names, dtypes=cast, transposed=turned)

    def apply(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors as they will be after the change."""
        result = {}
        for name, info in tensors.items():
            new = self.renames.get(name, name)
            if new is not None:
                changed = _cast(info, self.dtypes.get(name, info.dtype))
                is_transposed = name in self.transposed
                result[new] = replace(changed, shape=transposed_shape(info.shape)) if is_transposed else changed
        return result


def _cast(info: TensorInfo, dtype: str) -> TensorInfo:
    begin, end = info.span
    return replace(
        info, dtype=dtype, span=(begin, begin + (end - begin) * DTYPE_BITS[dtype] // DTYPE_BITS[info.dtype])
    )
