"""Arms that take turns, compared: ratios, the control, sweeps, and what is on disk afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli.bench_arguments import with_setting
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.compare import Comparison, compare_latency, compare_rows, doubling, sweep_batches
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.pool import Engines
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.store import append_rows, read_measurements
from grpo_toolkit.model.load import load_model, load_processor
from scripts.docs.latency_schema import json_schema
from tests.latency.test_engines import leave_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.row import LatencyRow

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "latency.schema.json"


@pytest.fixture(scope="module")
def live(qwen: Path) -> Arm:
    model, processor, _ = load_model(qwen)
    return Arm(name="live", live=(model, processor))


@pytest.fixture(scope="module")
def compared(qwen: Path) -> Comparison:
    arms = [Arm(name="base", path=qwen), Arm(name="no_cache", path=qwen, options=Options(use_cache=False))]
    traffic = made_up(load_processor(qwen), prompt_tokens=220, image_tokens=16, max_new_tokens=10)
    return compare_latency(arms, traffic, rounds=6, warmup=1, roofline=True)


def test_every_arm_is_held_against_the_first_round_by_round(compared: Comparison) -> None:
    base, no_cache = compared.rows
    assert base.ratios == []
    assert [(ratio.against, ratio.metric, ratio.pairs) for ratio in no_cache.ratios] == [
        ("base", "tpot_s", 6),
        ("base", "ttft_s", 6),
        ("base", "e2e_s", 6),
    ]
    times = [timeline.tpot_s for timeline in no_cache.timelines]
    others = [timeline.tpot_s for timeline in base.timelines]
    pairs = sorted(one / other for one, other in zip(times, others, strict=True))
    assert compared.ratio("no_cache").median == pytest.approx((pairs[2] * pairs[3]) ** 0.5)


def test_the_control_is_the_first_arm_once_more(compared: Comparison) -> None:
    assert compared.control is not None
    assert (compared.control.arm, compared.control.path) == ("control", compared.rows[0].path)
    assert {row.session for row in (*compared.rows, compared.control)} == {compared.rows[0].session}
    assert [ratio.against for ratio in compared.control.ratios] == ["base"] * 3
    # The same weights on the same requests: the work is the same, whatever the clock says.
    assert compared.control.proof == compared.rows[0].proof
    assert compared.control.memory.kv_bytes == compared.rows[0].memory.kv_bytes


def test_a_row_is_whole(compared: Comparison) -> None:
    for row in compared.rows:
        data = row.to_json()
        assert [name for name, value in data["phases"].items() if value is None] == []
        assert row.rounds == len(row.timelines) == 6
        assert (row.workload.kind, row.workload.prompt_tokens, row.workload.image_tokens) == ("fixed", 220, 16)
        assert row.roofline is not None
        assert row.roofline.vision_flops is not None
        assert row.roofline.mbu is not None
        assert 0 < row.roofline.mbu < 1
        assert (row.warmup_s or 0) > 0
        assert {"hardware", "threads", "torch", "transformers"} <= set(row.environment)
    base, no_cache = compared.rows
    assert base.memory.kv_theory_bytes == base.memory.kv_bytes
    assert no_cache.memory.kv_bytes is None
    assert (base.proof.is_cached, no_cache.proof.is_cached) == (True, False)


def test_rows_read_back_compare_as_they_did(compared: Comparison, tmp_path: Path) -> None:
    assert compared.control is not None
    append_rows(tmp_path / "latency.jsonl", [*compared.rows, compared.control])
    *rows, control = read_measurements(tmp_path / "latency.jsonl")
    assert compare_rows(rows, control=control) == compared
    strangers = [rows[0], replace(rows[1], session="another")]
    with pytest.raises(InputError, match="different sessions did not take turns"):
        compare_rows(strangers)
    with pytest.raises(InputError, match="no ratio of tpot_s for an arm 'base'"):
        compared.ratio("base")


def test_the_documented_schema_is_that_of_the_rows(compared: Comparison) -> None:
    how = "python -m scripts.docs.latency_schema > docs/latency.schema.json"
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), f"it has changed: {how}"
    # Every key of a real row is in the document, at every level.
    definitions = json_schema()["$defs"]
    _assert_described(compared.rows[1].to_json(), definitions["LatencyRow"], definitions)


def _assert_described(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    options = [option for option in (schema, *schema.get("anyOf", [])) if "$ref" in option]
    for option in options:
        schema = definitions[option["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        for item in value[:2]:
            _assert_described(item, schema.get("items", {}), definitions)
    elif isinstance(value, dict) and "properties" in schema:
        assert set(value) == set(schema["properties"])
        for name, item in value.items():
            _assert_described(item, schema["properties"][name], definitions)


def test_engines_outlive_a_measurement(qwen: Path) -> None:
    arm = Arm(name="base", path=qwen)
    traffic = made_up(load_processor(qwen), prompt_tokens=200, max_new_tokens=3)
    with Engines() as engines:
        first = engines.open(arm)
        measure_latency([arm], traffic, rounds=1, warmup=0, engines=engines)
        assert engines.open(replace(arm, name="other", options=Options(use_cache=False))) is first
        assert engines.open(replace(arm, process=1)) is not first
        assert engines.open(replace(arm, options=Options(attn_implementation="eager"))) is not first
    assert first._process.poll() is not None  # type: ignore[attr-defined]


def test_it_goes_on_until_it_is_precise_and_no_longer(live: Arm) -> None:
    traffic = made_up(live.live[1], prompt_tokens=200, max_new_tokens=3)  # type: ignore[index]
    arms = [live, replace(live, name="again")]
    rows = measure_latency(arms, traffic, rounds=6, warmup=1, precision=1e-9)
    assert [row.rounds for row in rows] == [120, 120]
    rows = measure_latency(arms, traffic, rounds=6, warmup=1, precision=1e9)
    assert [row.rounds for row in rows] == [6, 6]


def test_arms_that_all_fail_are_rows_with_their_errors(live: Arm) -> None:
    traffic = made_up(live.live[1], prompt_tokens=200, max_new_tokens=3)  # type: ignore[index]
    arms = [replace(live, name=name, options=Options(sdpa_backend="cudnn")) for name in ("one", "two")]
    found = compare_latency(arms, traffic, rounds=6, precision=0.01, roofline=True)
    assert found.control is not None
    for row in (*found.rows, found.control):
        assert "no SDPA kernel of those allowed" in str(row.error)
        assert (row.rounds, row.ratios, row.roofline) == (0, [], None)


def test_a_budget_ends_after_whole_blocks_but_not_before_six_rounds(live: Arm) -> None:
    traffic = made_up(live.live[1], prompt_tokens=200, max_new_tokens=3)  # type: ignore[index]
    (row,) = measure_latency([live], traffic, rounds=500, warmup=1, budget_s=0.0)
    assert row.rounds == 6


def test_a_sweep_over_what_is_asked(live: Arm) -> None:
    make = partial(made_up, live.live[1], prompt_tokens=200, max_new_tokens=3)  # type: ignore[index]

    def swept(key: str, values: list[Any], rounds: int = 1) -> list[LatencyRow]:
        return [
            row for value in values for row in measure_latency([live], make(**{key: value}), rounds=rounds, warmup=1)
        ]

    rows = swept("batch_size", [1, 2, 4])
    assert [row.workload.batch_size for row in rows] == [1, 2, 4]
    assert [row.tokens.output.n for row in rows if row.tokens] == [1, 2, 4]
    rows = swept("max_new_tokens", [2, 5])
    assert [row.tokens.output.median for row in rows if row.tokens] == [2, 5]
    rows = swept("image_tokens", [4, 16])
    assert [row.workload.image_tokens for row in rows] == [4, 16]
    rows = swept("lengths", ["repeated", "new"], rounds=2)
    assert [[t.prompt_tokens for t in row.timelines] for row in rows] == [[200, 200], [203, 206]]


def settings_of(arm: Arm, setting: Any, values: list[Any]) -> list[Arm]:
    return [
        replace(arm, name=f"{arm.name}_{value}", options=with_setting(arm.options, setting, value)) for value in values
    ]


def test_a_sweep_over_how_it_runs(live: Arm) -> None:
    traffic = made_up(live.live[1], prompt_tokens=200, max_new_tokens=3)  # type: ignore[index]
    arms = settings_of(live, "cache", ["dynamic", "static"])
    rows = compare_latency(arms, traffic, rounds=2, warmup=1, control=False).rows
    assert [(row.arm, row.settings.cache_implementation) for row in rows] == [
        ("live_dynamic", "dynamic"),
        ("live_static", "static"),
    ]
    assert rows[1].ratios[0].against == "live_dynamic"
    arms = settings_of(live, "sdpa_backend", [None, "math", "cudnn"])
    rows = compare_latency(arms, traffic, rounds=2, warmup=1, control=False).rows
    assert [row.error is None for row in rows] == [True, True, False]
    assert "no SDPA kernel of those allowed" in str(rows[2].error)
    assert (rows[2].rounds, rows[2].tpot_s, rows[2].timelines) == (0, None, [])


@pytest.mark.slow
def test_decoding_is_compiled_where_it_is_asked_for(live: Arm) -> None:
    import torch

    traffic = made_up(live.live[1], prompt_tokens=200, max_new_tokens=4)  # type: ignore[index]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arms = settings_of(live, "cache", ["static", "static+compile"])
    rows = compare_latency(arms, traffic, rounds=1, warmup=2, control=False).rows
    assert [row.settings.compiled for row in rows] == [False, True]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert rows[0].proof == rows[1].proof
    # What compiling took is in the warm-up, and not in the rounds.
    assert (rows[1].warmup_s or 0) > 2 * (rows[0].warmup_s or 0)


@pytest.mark.slow
def test_batch_sizes_double_until_out_of_memory_which_is_a_row(qwen: Path, fresh_workers: None) -> None:
    make = partial(made_up, load_processor(qwen), prompt_tokens=2000, max_new_tokens=2)
    arm = Arm(name="base", path=qwen, options=Options(attn_implementation="eager", threads=1))
    with Engines() as engines:
        leave_memory(engines.open(arm), 1_000_000_000)  # type: ignore[arg-type]

        def compare(arms: Sequence[Arm], size: int) -> list[Comparison]:
            traffic = make(batch_size=size)
            return [compare_latency(arms, traffic, rounds=1, warmup=1, control=False, engines=engines)]

        rows = [row for found in sweep_batches([arm], doubling(), compare) for row in found.rows]
    sizes = [row.workload.batch_size for row in rows]
    assert sizes == list(doubling())[: len(sizes)]
    assert 2 <= len(sizes) <= 6
    assert [row.error is None for row in rows] == [True] * (len(rows) - 1) + [False]
    assert str(rows[-1].error).startswith(f"out of memory with a batch of {sizes[-1]}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda arm: with_setting(arm.options, "cache", "paged"), "no cache called 'paged'"),
        (lambda arm: compare_latency([], []), "at least one arm"),
        (lambda arm: measure_latency([arm, arm], [object()]), "two arms have the same name"),
    ],
)
def test_what_cannot_be_measured_is_refused(live: Arm, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(live)
