"""One setting at a time: how an arm's latency depends on it.

What the requests are made of (batch size, lengths, image tokens) is measured value by value on one loaded model. How
the model runs (cache, attention, kernels, dtype) makes arms that take turns, so their ratios mean something.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.compare import compare_latency
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.engines.arms import Engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from grpo_toolkit.latency.bench.measure import Progress
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.rows.row import LatencyRow

Dimension = Literal["batch_size", "new_tokens", "prompt_tokens", "image_tokens", "lengths"]
Setting = Literal["cache", "attn_implementation", "sdpa_backend", "dtype", "use_cache"]

CACHES: Final[dict[str, dict[str, Any]]] = {
    "dynamic": {"cache_implementation": "dynamic", "compiled": False},
    "static": {"cache_implementation": "static", "compiled": False},
    "static+compile": {"cache_implementation": "static", "compiled": True},
    "static+compile+ahead": {"cache_implementation": "static", "compiled": True, "ahead": True},
}
"""The values of the setting `cache`, as options."""

LARGEST_BATCH: Final = 1024


def sweep_workload(
    arms: Sequence[Arm],
    dimension: Dimension,
    values: Sequence[Any] | None,
    *,
    make_traffic: Callable[..., Traffic],
    rounds: int = 8,
    warmup: int | None = None,
    budget_s: float | None = None,
    roofline: bool = False,
    progress: Progress | None = None,
    engines: Engines | None = None,
) -> list[LatencyRow]:
    """Measure arms at several values of what is asked.

    Args:
        arms: loaded once; they take turns at every value.
        dimension: what changes.
        values: in this order; None, for the batch size, is 1, 2, 4, ... until nothing fits.
        make_traffic: makes a workload from `{dimension: value}`, such as a partial of `workload.made_up`.
        rounds, warmup, budget_s, roofline, progress, engines: as for `measure_latency`; the budget is per value.

    Returns:
        A row per value and arm. An arm that ran out of memory has a row with its `error`, and is asked nothing larger.
    """
    if dimension not in get_args(Dimension):
        raise InputError(f"nothing to sweep called {dimension!r}; choose from {', '.join(get_args(Dimension))}")
    if values is None and dimension != "batch_size":
        raise InputError(f"a sweep of {dimension} needs its values")
    rows: list[LatencyRow] = []
    left = list(arms)
    with ExitStack() as stack:
        pool = engines or stack.enter_context(Engines())
        for value in doubling() if values is None else values:
            name = "max_new_tokens" if dimension == "new_tokens" else dimension
            traffic = make_traffic(**{name: value})
            found = measure_latency(
                left,
                replace(traffic, name=f"{traffic.name}_{dimension}_{value}"),
                rounds=rounds,
                warmup=warmup,
                budget_s=budget_s,
                roofline=roofline,
                progress=progress,
                engines=pool,
            )
            rows += found
            left = without_failed(left, found)
            if not left:
                break
    return rows


def without_failed(arms: Sequence[Arm], rows: Sequence[LatencyRow]) -> list[Arm]:
    """The arms whose rows have no error: one that ran out of memory is asked nothing larger."""
    failed = {row.arm for row in rows if row.error is not None}
    return [arm for arm in arms if arm.name not in failed]


def doubling() -> Iterator[int]:
    """Batch sizes 1, 2, 4, ..., to be left when nothing fits any more."""
    size = 1
    while size <= LARGEST_BATCH:
        yield size
        size *= 2


def sweep_settings(
    arm: Arm,
    setting: Setting,
    values: Sequence[Any],
    traffic: Traffic,
    *,
    rounds: int = 12,
    warmup: int | None = None,
    budget_s: float | None = None,
    roofline: bool = False,
    progress: Progress | None = None,
    engines: Engines | None = None,
) -> list[LatencyRow]:
    """Measure one arm under several settings that take turns; the others' `ratios` are against the first.

    Args:
        arm: what is measured.
        setting: what changes; `cache` takes the names of `CACHES`.
        values: the first is what the others are compared with.
        traffic: what is asked.
        rounds, warmup, budget_s, roofline, progress, engines: as for `compare_latency`.

    Raises:
        InputError: a setting or cache that is not known.
    """
    arms = [
        replace(arm, name=f"{arm.name}_{_word(value)}", options=with_setting(arm.options, setting, value))
        for value in values
    ]
    compared = compare_latency(
        arms,
        traffic,
        rounds=rounds,
        warmup=warmup,
        control=False,
        budget_s=budget_s,
        roofline=roofline,
        progress=progress,
        engines=engines,
    )
    return list(compared.rows)


def with_setting(options: Options, setting: Setting, value: Any) -> Options:
    """The options with one setting changed.

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


def _word(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)).replace("+", "_").replace(".", "_")
