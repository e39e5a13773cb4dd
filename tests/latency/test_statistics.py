"""From repeated measurements to a verdict: generated numbers for the pure part, and a real A/A."""

from __future__ import annotations

import math
import random
import statistics as reference
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.statistics import (
    MIN_PAIRS,
    allow_for,
    autocorrelation_time,
    is_settled,
    is_steady,
    paired_ratio,
    span,
    summary,
    turns,
    verdict,
)
from grpo_toolkit.latency.rows.row import Ratio

TIMES = st.lists(st.floats(1e-4, 10.0), min_size=MIN_PAIRS, max_size=40)


@pytest.mark.parametrize(
    ("count", "there"),
    [
        (63, []),
        (64, ["p90"]),
        (129, ["p90"]),
        (130, ["p90", "p95"]),
        (661, ["p90", "p95"]),
        (662, ["p90", "p95", "p99"]),
    ],
)
def test_percentiles_only_where_the_sample_carries_them(count: int, there: list[str]) -> None:
    found = summary([float(value) for value in range(count)])
    assert [name for name in ("p90", "p95", "p99") if getattr(found, name) is not None] == there
    assert found.n == count


def test_percentiles_are_those_of_the_sample() -> None:
    found = summary([float(value) for value in range(1001)])
    assert (found.median, found.q1, found.q3, found.p90, found.p95, found.p99) == (500, 250, 750, 900, 950, 990)


@settings(max_examples=60, deadline=None)
@given(TIMES, st.randoms(use_true_random=False))
def test_a_summary_does_not_depend_on_the_order(times: list[float], rng: random.Random) -> None:
    shuffled = list(times)
    rng.shuffle(shuffled)
    found = summary(times)
    assert found == summary(shuffled)
    assert min(times) <= found.q1 <= found.median <= found.q3 <= max(times)


@given(st.integers(1, 7), st.integers(0, 50))
def test_every_round_has_every_arm_once_and_its_block_goes_back_as_it_came(count: int, block: int) -> None:
    names = [f"arm{index}" for index in range(count)]
    there, back = turns(names, 2 * block), turns(names, 2 * block + 1)
    assert sorted(there) == names
    assert back == there[::-1]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_arm_is_as_often_early_as_late(count: int) -> None:
    names = [f"arm{index}" for index in range(count)]
    places = Counter((name, place) for round_ in range(2 * count) for place, name in enumerate(turns(names, round_)))
    assert set(places.values()) == {2}


def test_warm_up_ends_when_medians_agree() -> None:
    assert not is_steady([1.0] * 5)
    assert is_steady([9.0, 1.0, 1.0, 1.0, 1.02, 1.0])
    assert not is_steady([9.0, 5.0, 3.0, 1.0, 1.0, 1.0])
    assert is_steady([9.0, 5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 5.0), TIMES)
def test_a_constant_ratio_is_found_exactly(factor: float, times: list[float]) -> None:
    found = paired_ratio([factor * time for time in times], times, name="base")
    for value in (found.low, found.median, found.high):
        assert value == pytest.approx(factor)
    assert (found.against, found.pairs) == ("base", len(times))


@pytest.mark.parametrize("pairs", [1, 2, MIN_PAIRS - 1])
def test_too_few_rounds_have_no_interval(pairs: int) -> None:
    """One round against another has no spread at all: an interval of zero width would claim the most of the least."""
    found = paired_ratio([1.59] * pairs, [1.0] * pairs, name="base")
    assert (found.median, found.low, found.high) == (pytest.approx(1.59), None, None)
    assert found.verdict == "cannot tell"
    assert span(found) == "no interval"
    assert not is_settled(found, precision=0.02)
    assert allow_for(ratio(1.04, 1.06, 1.08), found).verdict == "cannot tell"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)), min_size=6, max_size=30))
def test_a_ratio_turned_round_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    found, inverse = paired_ratio(one, other, name="b"), paired_ratio(other, one, name="a")
    assert found.median == pytest.approx(1 / inverse.median)
    assert found.low <= found.median <= found.high
    assert found.low == pytest.approx(1 / inverse.high, rel=0.05)
    assert paired_ratio(one, other, name="b") == found


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(7)
    covered = 0
    for _ in range(200):
        drift = [rng.uniform(1.0, 3.0) for _ in range(20)]  # a machine that changes its pace hits both
        one = [pace * 1.05 * rng.lognormvariate(0.0, 0.05) for pace in drift]
        other = [pace * rng.lognormvariate(0.0, 0.05) for pace in drift]
        found = paired_ratio(one, other, name="base")
        covered += found.low <= 1.05 <= found.high
    assert covered >= 180


def test_rounds_that_resemble_their_neighbours_count_for_fewer() -> None:
    rng = random.Random(7)
    assert autocorrelation_time([rng.gauss(0, 1) for _ in range(4000)]) == pytest.approx(1.0, abs=0.15)
    # Of x[i] = 0.6 x[i-1] + noise it is (1 + 0.6) / (1 - 0.6) = 4.
    assert autocorrelation_time(spells(rng, 4000)) == pytest.approx(4.0, abs=0.8)
    assert autocorrelation_time([0.5] * 30) == 1.0


def test_a_busy_host_that_slows_one_process_for_seconds_is_seldom_called_a_difference() -> None:
    """Bootstrap intervals of independent rounds claim a difference between equal arms in 28 of 100 such cases."""
    rng = random.Random(11)
    ratios = [
        paired_ratio([math.exp(0.02 * value) for value in spells(rng, 30)], [1.0] * 30, name="a") for _ in range(100)
    ]
    assert sum(ratio.verdict in ("slower", "faster") or not ratio.low <= 1 <= ratio.high for ratio in ratios) <= 15


def spells(rng: random.Random, count: int) -> list[float]:
    """Noise that lasts: each value keeps 0.6 of the one before."""
    values = [rng.gauss(0, 1.25)]
    while len(values) < count:
        values.append(0.6 * values[-1] + rng.gauss(0, 1))
    return values


def test_an_arm_against_itself_is_the_same_where_there_are_enough_rounds() -> None:
    rng = random.Random(3)
    verdicts = Counter(
        paired_ratio(
            [rng.lognormvariate(0.0, 0.03) for _ in range(60)], [rng.lognormvariate(0.0, 0.03) for _ in range(60)],
            name="a",
        ).verdict
        for _ in range(40)
    )  # fmt: skip
    assert verdicts["same"] >= 38


@pytest.mark.parametrize(
    ("pairs", "low", "median", "high", "expected"),
    [
        (12, 0.98, 1.0, 1.02, "same"),
        (12, 1.01, 1.02, 1.029, "same"),
        (12, 1.01, 1.04, 1.05, "slower"),
        (12, 0.80, 0.90, 0.99, "faster"),
        (12, 0.90, 1.0, 1.10, "cannot tell"),
        (24, 1.003, 1.014, 1.054, "cannot tell"),  # a real export beside its base, on a busy machine
        (24, 0.93, 0.98, 0.999, "cannot tell"),
        (MIN_PAIRS - 1, 0.99, 1.0, 1.01, "cannot tell"),
        (MIN_PAIRS - 1, 1.9, 2.0, 2.1, "cannot tell"),
    ],
)
def test_verdicts(pairs: int, low: float, median: float, high: float, expected: str) -> None:
    assert verdict(pairs, low=low, median=median, high=high) == expected


def ratio(low: float, median: float, high: float, found: str = "slower") -> Ratio:
    return Ratio(against="base", median=median, low=low, high=high, pairs=12, verdict=found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arm", "control", "expected"),
    [
        (ratio(1.04, 1.06, 1.08), None, "slower"),
        (ratio(1.04, 1.06, 1.08), ratio(0.99, 1.0, 1.02, "same"), "slower"),
        (ratio(1.04, 1.06, 1.08), ratio(1.03, 1.05, 1.07), "cannot tell"),
        (ratio(0.5, 0.6, 0.7, "faster"), ratio(0.9, 1.0, 1.2, "cannot tell"), "faster"),
        (ratio(0.9, 0.95, 0.98, "faster"), ratio(0.94, 1.0, 1.2, "cannot tell"), "cannot tell"),
        (ratio(0.98, 1.0, 1.02, "same"), ratio(1.03, 1.05, 1.07), "same"),
    ],
)
def test_a_difference_no_larger_than_the_controls_is_not_claimed(
    arm: Ratio, control: Ratio | None, expected: str
) -> None:
    assert allow_for(arm, control).verdict == expected


@pytest.mark.parametrize(
    ("low", "median", "high", "expected"),
    [(0.99, 1.0, 1.01, True), (0.96, 1.0, 1.04, False), (2.0, 2.2, 2.4, True), (1.02, 1.06, 1.10, False)],
)
def test_when_more_rounds_tell_nothing_new(low: float, median: float, high: float, expected: bool) -> None:
    assert is_settled(ratio(low, median, high), precision=0.02) is expected


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([1.0], [1.0, 2.0], "1 and 2 measurements cannot be paired"),
        ([], [], "cannot be paired"),
        ([0.0], [1.0], "not a positive number"),
        ([1.0], [math.nan], "not a positive number"),
        ([math.inf], [1.0], "not a positive number"),
    ],
)
def test_what_cannot_be_compared_is_refused(one: list[float], other: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired_ratio(one, other, name="base")


def test_medians_are_of_pairs_and_not_of_arms() -> None:
    # The arms' medians are 3 and 3; pair by pair the first is twice as slow in three of five rounds.
    one, other = [2.0, 4.0, 6.0, 3.0, 1.0], [1.0, 2.0, 3.0, 6.0, 4.0]
    assert reference.median(one) == reference.median(other) == 3.0
    assert paired_ratio(one, other, name="b").median == pytest.approx(2.0)
