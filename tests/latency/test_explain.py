"""Why is it slow: every seeded cause is found without a clock, and its effect is what the difference is made of."""

from __future__ import annotations

import io
import json
from itertools import combinations
from typing import TYPE_CHECKING

import pytest
import transformers
from packaging.version import Version
from rich.console import Console

from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, UnsupportedError
from grpo_toolkit.latency.engines.pool import Engines, source_of
from grpo_toolkit.latency.explain.effects import arms_of, shares
from grpo_toolkit.latency.explain.exact_split import split_exactly
from grpo_toolkit.latency.explain.explanation import explain_latency, top_cause, unexplained_share
from grpo_toolkit.latency.explain.physics import Machine, Work, _step
from grpo_toolkit.latency.rows.row import Effect, ExplanationRow, LatencyRow
from grpo_toolkit.latency.rows.store import append_rows, read_rows
from grpo_toolkit.latency.rows.timeline import Timeline
from grpo_toolkit.latency.tune.tuning import STATIC_SINCE
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.hardware.model_sizes import ModelSizes
from grpo_toolkit.model.load import load_model
from grpo_toolkit.reporting.terminal.explanation import explanation
from scripts.benchmarks.seeded_causes import ABOUT_LENGTHS, ALL, bases, seed_causes
from tests.support.models import build_qwen2_5_vl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRONG = ("cache-off", "pixel-limits", "device-map", "eos", "longer-answers")
"""Causes that cost so much on the tiny model that a busy machine cannot hide a tenth of it."""

PAIRS = (
    ("pixel-limits", "unmerged-adapter"),
    ("cache-off", "attention"),
    ("sdpa-backend", "eos"),
    ("device-map", "float32"),
)


@pytest.fixture(scope="module")
def asked() -> Request:
    from PIL import Image

    image = Image.effect_noise((224, 224), 64).convert("RGB")
    return Request(messages=[{"role": "user", "content": "What is this? " * 60}], images=[image])


@pytest.fixture(scope="module")
def pool() -> Iterator[Engines]:
    with Engines(isolated=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_bases(tmp_path_factory: pytest.TempPathFactory, asked: Request, pool: Engines) -> tuple[Path, Path]:
    base = build_qwen2_5_vl(tmp_path_factory.mktemp("explained") / "base", dtype="bfloat16")
    return bases(base, base.parent, asked, pool)


def explained(
    two_bases: tuple[Path, Path], folder: Path, causes: tuple[str, ...], asked: Request, pool: Engines, rounds: int = 4
) -> ExplanationRow:
    if "static-cache" in causes and Version(transformers.__version__) < Version(STATIC_SINCE["qwen2_5_vl"]):
        pytest.skip("generate takes no static cache for this model here")
    seeded = seed_causes(two_bases[bool(ABOUT_LENGTHS & set(causes))], folder, causes)
    row = explain_latency(
        seeded.base,
        seeded.trained,
        requests=[asked],
        processor=seeded.processor,
        max_new_tokens=48,
        rounds=rounds,
        trained_options=seeded.options,
        pool=pool,
    )
    pool.release(source_of(seeded.trained, seeded.processor))
    return row


@pytest.mark.parametrize("cause", ALL)
def test_a_cause_alone_is_the_top_cause_and_all_that_is_found(
    cause: str, two_bases: tuple[Path, Path], tmp_path: Path, asked: Request, pool: Engines
) -> None:
    rounds = 6 if cause in STRONG else 4
    row = explained(two_bases, tmp_path, (cause,), asked, pool, rounds)
    assert [effect.cause for effect in row.audit] == [cause]
    assert top_cause(row) == cause
    assert [effect.cause for effect in row.effects] == [cause, "unexplained"]
    assert_sums_up(row)
    assert all(effect.evidence and effect.cure and effect.command for effect in row.audit)
    if cause in STRONG:
        again = (explained(two_bases, tmp_path / str(turn), (cause,), asked, pool, rounds) for turn in range(3))
        assert unexplained_share(row) <= 0.1 or any(unexplained_share(other) <= 0.1 for other in again)


@pytest.mark.parametrize("causes", PAIRS, ids="+".join)
def test_of_two_causes_both_are_found_and_one_of_them_is_the_top_cause(
    causes: tuple[str, str], two_bases: tuple[Path, Path], tmp_path: Path, asked: Request, pool: Engines
) -> None:
    row = explained(two_bases, tmp_path, causes, asked, pool, rounds=3)
    assert {effect.cause for effect in row.audit} == set(causes)
    assert top_cause(row) in causes
    assert_sums_up(row)


def assert_sums_up(row: ExplanationRow) -> None:
    difference = row.trained_s - row.base_s
    for effects in (row.split, row.effects):
        assert sum(effect.effect_s for effect in effects) == pytest.approx(difference, abs=1e-9)


def test_a_model_beside_itself_has_no_cause(
    two_bases: tuple[Path, Path], tmp_path: Path, asked: Request, pool: Engines
) -> None:
    row = explained(two_bases, tmp_path, (), asked, pool, rounds=2)
    assert row.audit == []
    assert top_cause(row) is None
    path = tmp_path / "latency.jsonl"
    append_rows(path, [row])
    assert read_rows(path) == [row]


def test_a_base_without_a_cache_is_said_although_it_is_no_difference(
    two_bases: tuple[Path, Path], tmp_path: Path, asked: Request, pool: Engines
) -> None:
    slow = seed_causes(two_bases[0], tmp_path, ("cache-off",)).trained
    row = explain_latency(slow, slow, requests=[asked], max_new_tokens=4, rounds=1, pool=pool)
    pool.release(source_of(slow))
    assert [effect.cause for effect in row.audit] == ["cache-off"]
    assert row.audit[0].evidence.endswith("the base decodes without a cache too, so both are slow")
    assert [effect.layer for effect in row.effects] == ["unexplained"]
    assert [(effect.low_s, effect.high_s) for effect in row.effects] == [(None, None)]  # of one round
    assert (row.low_s, row.high_s) == (None, None)
    assert top_cause(row) == "cache-off"


def test_another_chat_template_is_seen_by_the_tokens_that_it_makes(
    two_bases: tuple[Path, Path], tmp_path: Path, asked: Request, pool: Engines
) -> None:
    folder = seed_causes(two_bases[0], tmp_path, ()).trained
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()  # a hard link to the base's
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "Think, then answer. " * 4 + template}))
    row = explain_latency(two_bases[0], folder, requests=[asked], max_new_tokens=4, rounds=1, pool=pool)
    pool.release(source_of(folder))
    (found,) = row.audit
    assert found.cause == "prompt"
    assert found.evidence.startswith("the same messages become ")
    assert (found.low_s, found.command) == (None, f"grpo-toolkit doctor {folder} --base {two_bases[0]}")


def test_a_model_that_cannot_generate_is_one_clear_error(
    two_bases: tuple[Path, Path], asked: Request, pool: Engines
) -> None:
    model, processor, _ = load_model(two_bases[0])

    def fails(*_: object) -> None:
        raise RuntimeError("a size does not fit\nand where that was")

    model.register_forward_pre_hook(fails)
    with pytest.raises(
        UnsupportedError,
        match=r"generate fails as the model stands \(a size does not fit\), so there is nothing to time",
    ):
        explain_latency(two_bases[0], model, requests=[asked], processor=processor, rounds=1, pool=pool)
    pool.release(source_of(model, processor))


def timeline(times: list[float], **phases: float) -> Timeline:
    return Timeline(
        token_times_s=times,
        prompt_tokens=9,
        output_tokens=len(times),
        phases_s={f"{name}_s": seconds for name, seconds in phases.items()},
    )


def test_the_split_is_exact_and_charges_half_of_a_product_to_each_factor() -> None:
    base = timeline([1.0, 1.5, 2.0], tokenize=0.25, vision=0.25, prefill=0.5, decode=1.0, detokenize=0.0)
    trained = timeline([2.0, 3.0, 4.0, 5.0, 6.0], tokenize=0.25, vision=1.25, prefill=0.5, decode=4.0, detokenize=0.5)
    assert {effect.cause: effect.effect_s for effect in split_exactly([base], [trained])} == {
        "vision tower": 1.0,
        "number of tokens": 1.5,  # two steps more, at 0.75 s
        "time per token": 1.5,  # half a second more, three steps
        "detokenising": 0.5,
    }


def test_without_phases_what_comes_before_the_first_token_is_prefill() -> None:
    effects = split_exactly([timeline([1.0])], [timeline([2.0, 4.0])])
    assert effects == [
        Effect(layer="exact", cause="prefill", effect_s=1.0),
        Effect(layer="exact", cause="number of tokens", effect_s=2.0),
    ]
    with pytest.raises(InputError, match="1 and 0 timelines cannot be paired"):
        split_exactly([timeline([1.0])], [])


def test_effects_that_act_on_each_other_are_shared() -> None:
    values = {frozenset(): 1.0, frozenset("a"): 3.0, frozenset("b"): 2.0, frozenset("ab"): 10.0}
    assert shares(["a", "b"], values) == {"a": 5.0, "b": 4.0}
    assert shares([], {frozenset(): 1.0}) == {}


def test_few_causes_are_measured_in_every_combination_many_in_two_orders() -> None:
    assert [len(arms_of(list("abcdef")[:count])) for count in range(7)] == [1, 2, 4, 8, 8, 10, 12]
    assert {frozenset(pair) for pair in combinations("abc", 2)} <= set(arms_of(list("abc")))


@pytest.mark.parametrize(("overlaps", "costs"), [(True, 0.0), (False, 0.007)])
def test_physics_lets_a_gpu_hide_a_lost_cache_behind_its_launches(overlaps: bool, costs: float) -> None:
    sizes = ModelSizes(
        parameters=10**9, weights_bytes=2 * 10**9, decode_bytes=2 * 10**9, decode_parameters=10**9, head_parameters=0,
        layers=0, heads=1, kv_heads=1, head_dim=1, element_bytes=2,
    )  # fmt: skip
    shared = {
        "parameters": 10**9, "element_bytes": 2.0, "prompt_tokens": 1000, "output_tokens": 0, "patches": 0,
        "sees_again": False, "sizes": sizes,
    }  # fmt: skip
    machine = Machine(bandwidth=2e12, flops=2.5e14, overlaps=overlaps, base_ttft_s=0.1, base_tpot_s=0.03)
    cached, uncached = (Work(is_cached=is_cached, **shared) for is_cached in (True, False))  # type: ignore[arg-type]
    # 2 x 10^9 x 1000 FLOPs at 2.5e14 are 8 ms, reading the weights is 1 ms, launching is 30 ms
    assert _step(uncached, cached, machine) - _step(cached, cached, machine) == pytest.approx(costs)


def test_the_command_says_why_and_finds_something(
    two_bases: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded = seed_causes(two_bases[0], tmp_path, ("cache-off",))
    out = tmp_path / "latency.jsonl"
    command = ["explain", str(seeded.base), str(seeded.trained), "--max-new-tokens", "8", "--rounds", "2"]
    assert main([*command, "--prompt", "What?", "--json", "--output", str(out)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["top_cause"] == "cache-off"
    assert said["audit"][0]["command"] == f"grpo-toolkit repair {seeded.trained} --base {seeded.base}"
    (row,) = read_rows(out)
    assert isinstance(row, ExplanationRow)
    console = Console(width=100, file=io.StringIO())
    console.print(explanation(row), crop=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mend first: KV cache off" in shown
    assert f"→ grpo-toolkit repair {seeded.trained} --base {seeded.base}\n" in shown  # unbroken, for copying
    assert "% explained" in shown


def test_the_command_asks_with_and_without_the_instruction_to_think(
    two_bases: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(two_bases[0]), tmp_path / "latency.jsonl"
    command = ["explain", base, base, "--max-new-tokens", "4", "--rounds", "1", "--output", str(out)]
    main([*command, "--prompt", "What? Think hard.", "--thinking", "Think hard."])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Thinking: " in shown
    assert "of an answer's time, asked with and without the instruction" in shown
    _, direct, thinking = read_rows(out)
    assert isinstance(direct, LatencyRow)
    assert isinstance(thinking, LatencyRow)
    assert [row.workload.thinking for row in (direct, thinking)] == [False, True]
    assert direct.session == thinking.session
    assert direct.workload.prompt_tokens < thinking.workload.prompt_tokens


@pytest.mark.parametrize("setting", ["dtype=int3", "colour=red", "use_cache"])
def test_settings_that_are_not_known_are_refused(
    two_bases: tuple[Path, Path], setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(two_bases[0])
    assert main(["explain", base, base, "--with", setting]) == 2
    assert f"--with {setting}: expected" in capsys.readouterr().err
