"""One setting at a time: options with one thing changed, and batch sizes as far as memory goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from grpo_toolkit.latency.bench.compare import Comparison
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Options

Setting = Literal["cache", "attn_implementation", "sdpa_backend", "dtype", "use_cache"]

CACHES: Final[dict[str, dict[str, Any]]] = {
    "dynamic": {"cache_implementation": "dynamic", "compiled": False},
    "static": {"cache_implementation": "static", "compiled": False},
    "static+compile": {"cache_implementation": "static", "compiled": True},
    "static+compile+ahead": {"cache_implementation": "static", "compiled": True, "ahead": True},
}
"""The values of the setting `cache`, as options."""

LARGEST_BATCH: Final = 1024


def doubling() -> Iterator[int]:
    """Yield the batch sizes 1, 2, 4, ..., to be left when nothing fits any more."""
    size = 1
    while size <= LARGEST_BATCH:
        yield size
        size *= 2


def sweep_batches(
    arms: Sequence[Arm], sizes: Iterable[int], compare: Callable[[Sequence[Arm], int], Comparison]
) -> Iterator[Comparison]:
    """Compare arms at one batch size after the other.

    Args:
        arms: what is compared; one that ran out of memory is asked nothing larger.
        sizes: in this order, such as `doubling()`.
        compare: compares the arms that are left at one size.
    """
    left = list(arms)
    for size in sizes:
        comparison = compare(left, size)
        yield comparison
        failed = {row.arm for row in comparison.rows if row.error is not None}
        left = [arm for arm in left if arm.name not in failed]
        if not left:
            return


def with_setting(options: Options, setting: Setting, value: Any) -> Options:
    """Return the options with one setting changed.

    Raises:
        InputError: a setting or cache that is not known.
    """
    if setting not in get_args(Setting):
        raise InputError(f"no setting called {setting!r}; choose from {', '.join(get_args(Setting))}")
    if setting != "cache":
        return replace(options, **{setting: value})
    if value not in CACHES:
        raise InputError(f"no cache called {value!r}; choose from {', '.join(CACHES)}")
    return replace(options, **CACHES[value])
