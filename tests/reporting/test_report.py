"""The report and its charts: what is drawn, what is left out and said, what adds up."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.rows.review import Review, comparisons, key_part, load_review, visits_of
from grpo_toolkit.latency.rows.row import Effect, Ratio
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.reporting.charts.first_token import first_token_phases
from grpo_toolkit.reporting.charts.gallery import CHARTS
from grpo_toolkit.reporting.charts.style import PALETTE
from grpo_toolkit.reporting.charts.waterfall import waterfall_bars
from grpo_toolkit.reporting.report.folder_findings import write_findings
from grpo_toolkit.reporting.report.headline import headline_of
from grpo_toolkit.reporting.report.page import write_comparison, write_report
from tests.support.latency_rows import arms, batch_sweep, everything, explanations, image_sweep, natural, row

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.row import LatencyRow, Verdict

NAMES = [
    "tpot", "first_token", "waterfall", "positions", "distributions", "batches", "images", "lengths", "roofline",
    "trend",
]  # fmt: skip

TIMES = "\N{MULTIPLICATION SIGN}"


def over_base(low: float | None, high: float | None, verdict: Verdict, pairs: int = 12) -> list[LatencyRow]:
    ratio = Ratio(against="base", median=0.79, low=low, high=high, pairs=pairs, verdict=verdict)
    return [row("base"), row("export", ratios=[ratio])]


def written(folder: Path, rows: Any) -> Review:
    append_rows(folder / "latency" / "latency.jsonl", rows)
    return load_review(folder)


def figures(page: str) -> list[str]:
    return re.findall(r'<figure id="(\w+)">', page)


def test_every_chart_is_in_the_page_of_a_run_that_measured_everything(tmp_path: Path) -> None:
    page = write_report(written(tmp_path, everything()))
    assert page == tmp_path / "latency" / "report.html"
    text = page.read_text()
    assert figures(text) == NAMES == [chart.name for chart in CHARTS]
    assert text.count("<svg ") == len(NAMES)
    assert "Not drawn" not in text
    assert "base, batch 32: out of memory" in text
    assert "<b>eager attention</b> eager, not sdpa" in text


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    text = write_report(written(tmp_path, everything())).read_text()
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert not re.search(r"@import|url\((?!#)", text)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_light_and_dark_are_one_drawing(tmp_path: Path) -> None:
    text = write_report(written(tmp_path, everything())).read_text()
    drawings = text[text.index('<div class="grid">') :]
    for name, (light, dark) in PALETTE.items():
        assert text.count(f"--{name}: {light};") == 1
        assert text.count(f"--{name}: {dark};") == 1
        assert light not in drawings
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text


def test_ids_of_charts_in_one_page_do_not_meet(tmp_path: Path) -> None:
    text = write_report(written(tmp_path, everything())).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', text))
    assert used <= set(ids)


def test_the_headline_is_the_export_against_the_base_with_its_interval(tmp_path: Path) -> None:
    review = written(tmp_path, arms())
    found = headline_of(review)
    assert found is not None
    assert (found.figure, found.verdict) == (f"0.98{TIMES}", "same")
    assert found.sentence == (
        f"Export 19.6 ms per token, 0.98{TIMES} the base's. "
        "95% interval 0.96 to 1.01 over 12 rounds: the same within 3%."
    )
    text = html.unescape(write_report(review).read_text())
    assert f'<span class="figure">0.98{TIMES}</span>' in text
    assert found.sentence in text


def test_on_a_phone_every_cell_has_its_columns_name(tmp_path: Path) -> None:
    """Narrow windows show a table's row as a card of names and values, so no column is cut."""
    text = write_report(written(tmp_path, everything())).read_text()
    tables = re.findall(r'<div class="cards"><table>(.*?)</table>', text, re.DOTALL)
    assert len(tables) == 3
    for table in tables:
        head, *rows = table.split("<tr>")[1:]
        width = head.count("<th")
        for cells in rows:
            assert cells.count("<td") == width
            assert cells.count("data-name=") == width - 1
    assert 'class="scroll"' not in text


@pytest.mark.parametrize(
    ("rows", "figure", "verdict", "end"),
    [
        ([row("base"), row("export", ratios=[])], "no interval", "", "without an interval: it may be chance."),
        (over_base(0.71, 1.33, "cannot tell"), f"0.71 to 1.33{TIMES}", "cannot tell", f"Their median is 0.79{TIMES}."),
        (over_base(None, None, "cannot tell", 3), "no interval", "", "No interval over 3 rounds: it takes 6."),
        (over_base(None, None, "cannot tell", 1), "no interval", "", "No interval over 1 round: it takes 6."),
        ([row("mine")], "20.0 ms", "", "no second arm to compare with."),
    ],
)
def test_what_cannot_be_claimed_is_not(rows: Any, figure: str, verdict: str, end: str, tmp_path: Path) -> None:
    found = headline_of(written(tmp_path, rows))
    assert found is not None
    assert (found.figure, found.verdict) == (figure, verdict)
    assert found.sentence.endswith(end)


def test_a_headline_has_one_estimator(tmp_path: Path) -> None:
    """The median of the paired ratios and the ratio of the medians may lie on two sides of 1."""
    rows = over_base(0.71, 1.33, "cannot tell")
    rows = [rows[0], replace(rows[1], tpot_s=replace(rows[1].tpot_s, median=0.0251))]
    found = headline_of(written(tmp_path, rows))
    assert found is not None
    assert "25.1 ms per token" in found.sentence
    assert "20.0" not in found.sentence
    assert found.figure != f"0.79{TIMES}"


@pytest.mark.parametrize(
    ("low", "high", "figure", "verdict"),
    [
        (0.015, 0.017, f"1.80{TIMES}", ""),
        (-0.001, 0.033, "\N{MINUS SIGN}1.0 to +33.0 ms", "cannot tell"),
        (None, None, "no interval", ""),
    ],
)
def test_an_explanation_says_what_its_interval_allows(
    low: float | None, high: float | None, figure: str, verdict: str, tmp_path: Path
) -> None:
    found = headline_of(written(tmp_path, [replace(explanations()[0], low_s=low, high_s=high)]))
    assert found is not None
    assert (found.figure, found.verdict) == (figure, verdict)


def test_what_was_not_measured_is_left_out_and_said(tmp_path: Path) -> None:
    text = write_report(written(tmp_path, [row("base"), row("export", ratios=[])])).read_text()
    assert figures(text) == ["tpot", "first_token", "waterfall", "positions", "distributions"]
    for chart in CHARTS[5:]:
        assert f"{chart.title} <small>needs {chart.needs}</small>" in text


def test_a_report_of_rows_that_were_really_measured(qwen: Path, tmp_path: Path) -> None:
    request = Request(messages=[{"role": "user", "content": "What?"}])
    both = [Arm(name="base", path=qwen), Arm(name="export", path=qwen)]
    review = written(tmp_path, measure_latency(both, [request], new_tokens=6, rounds=2, warmup=1))
    text = write_report(review).read_text()
    assert figures(text)[:5] == ["tpot", "first_token", "waterfall", "positions", "distributions"]
    phases = first_token_phases(review.arms[0])
    assert {"tokenize_s", "prefill_s"} <= set(phases)
    assert sum(phases.values()) == pytest.approx(review.arms[0].ttft_s.median)
    assert f"{review.arms[0].tpot_s.median * 1e3:,.2f}" in text
    assert 'base: <span class="ok">clean</span>' in text


def test_names_of_strangers_are_text(tmp_path: Path) -> None:
    text = write_report(written(tmp_path, [row("<script>alert(1)</script>"), row("base")])).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_only_rows_that_took_turns_are_compared() -> None:
    rows = [*arms(session="one", step=1), *batch_sweep(), *arms(session="two", step=2)[:2]]
    found = comparisons(rows)
    assert [[r.arm for r in group] for group in found] == [
        ["base", "checkpoint", "export", "export_no_cache"],
        *[["base", "export"]] * 5,
        ["base", "checkpoint"],
    ]
    assert [{r.workload.batch_size for r in group} for group in found[1:6]] == [{1}, {2}, {4}, {8}, {16}]


def test_sweeps_take_the_newest_row_of_each_point(tmp_path: Path) -> None:
    again = (
        row("base", session="again", batch_size=4, tag="batch"),
        row("base", session="again", batch_size=8, tag="b"),
    )
    review = Review(path=tmp_path, rows=[*arms(), *batch_sweep(), *again, *image_sweep(), *natural()])
    points = [(r.arm, r.workload.batch_size, r.session) for r in review.batches]
    assert points == [
        ("base", 1, "batches"), ("base", 2, "batches"), ("base", 4, "again"), ("base", 8, "again"),
        ("base", 16, "batches"), ("base", 32, "batches"),
        *(("export", size, "batches") for size in (1, 2, 4, 8, 16)),
    ]  # fmt: skip
    assert [(r.arm, r.workload.image_tokens) for r in review.images] == [
        (arm, count) for arm in ("base", "export") for count in (64, 256, 1024, 4096)
    ]
    assert [r.arm for r in review.natural] == ["base", "export"]


def test_a_visit_is_a_session_at_a_step_with_all_its_rows(tmp_path: Path) -> None:
    found = visits_of(written(tmp_path, everything()))
    assert [(visit.step, len(visit.ids)) for visit in found] == [(100, 25), (200, 4)]
    assert [[r.arm for r in visit.main] for visit in found] == [
        ["base", "checkpoint", "export", "export_no_cache"]
    ] * 2
    assert [{r.session for r in visit.main} for visit in found] == [{"early"}, {"late"}]
    assert [r.arm for r in found[0].natural] == ["base", "export"]


def test_without_a_training_every_session_is_a_visit_and_one_sequence_stands_first(tmp_path: Path) -> None:
    def session(number: int, **changes: Any) -> list[LatencyRow]:
        return [row(arm, session=str(number), step=None, **changes) for arm in ("base", "export", "control")]

    live = replace(row("base").workload, name="natural", kind="natural", image_tokens=None)
    rows = [*session(1), *session(2, batch_size=4), *session(3, workload=live)]
    review = Review(path=tmp_path, rows=rows)
    assert [(visit.step, [r.arm for r in visit.main]) for visit in visits_of(review)] == [(0, ["base", "export"])] * 3
    assert {r.session for r in review.arms} == {"1"}
    assert [(r.arm, r.workload.batch_size) for r in review.batches] == [
        ("base", 1), ("base", 4), ("export", 1), ("export", 4),
    ]  # fmt: skip
    assert {r.arm for r in review.natural} == {"base", "export"}


def test_a_row_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    review = written(tmp_path, [*arms(), *arms()])
    assert len(review.rows) == 4


def test_names_become_parts_of_keys() -> None:
    assert [key_part(name) for name in ("export", "a/b.c", "../..", "x y")] == ["export", "a_b_c", "unnamed", "x_y"]


def test_findings_that_were_kept_are_shown_and_what_an_export_put_right(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    repair = {"file": "generation_config.json", "key": "use_cache", "found": False, "written": True}
    checks = [{"name": "loads whole", "passed": True, "detail": "102,176 parameters"}]
    manifest = {"manifest_version": 1, "put_right": [repair], "verification": {"checks": checks}}
    (export / "grpo_toolkit.json").write_text(json.dumps(manifest))
    (export / "config.json").write_text("{}")
    review = written(tmp_path, [row("base"), row("export", path=str(export))])
    finding = {
        "code": "generation-cache-off", "severity": "slow", "file": "generation_config.json", "key": "use_cache",
        "effect": "Every token computes the whole sequence again.",
    }  # fmt: skip
    diagnosis = {"clean": False, "kind": "model", "facts": ["Qwen"], "findings": [finding]}
    write_findings(review.path, {"checkpoint": diagnosis})
    text = write_report(review).read_text()
    assert "plain checkpoint: 1 found" in text
    assert '<span class="tag slow">slow</span><b>generation-cache-off</b>' in text
    assert "<td>generation_config.json</td>" in text
    assert '<td class="text" data-name="was">False</td><td class="text" data-name="is">True</td>' in text
    assert "loads whole <small>102,176 parameters</small>" in text


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    one, other = written(tmp_path / "first", arms()), written(tmp_path / "second", arms(session="s"))
    text = write_comparison(one, other, tmp_path / "both.html").read_text()
    assert "first → second" in text
    assert "they did not take turns, so small differences mean nothing" in text
    assert figures(text) == ["tpot", "positions", "distributions"]
    assert f'<td data-name="TPOT ms">20.00 → 20.00</td><td data-name="ratio"><b>1.00{TIMES}</b></td>' in text
    assert f"4 rows in <code>{one.path}</code>, 4 rows in <code>{other.path}</code>" in text
    assert f"grpo-toolkit report --compare {one.path} {other.path}" in text
    assert "<li>first: step 100, " in text
    assert "<li>second: step 100, " in text
    assert "export (first)" in text
    assert "export (second)" in text


def test_of_two_runs_the_first_that_was_named_stands_first(tmp_path: Path) -> None:
    one, other = written(tmp_path / "z", arms()), written(tmp_path / "a", arms(session="s"))
    text = write_comparison(one, other, tmp_path / "both.html").read_text()
    drawing = text[text.index('<figure id="tpot">') :].partition("</figure>")[0]
    assert re.findall(r">(base|plain checkpoint|export) \((z|a)\)<", drawing) == [
        (arm, run) for arm in ("base", "plain checkpoint", "export") for run in ("z", "a")
    ]


def test_runs_without_a_common_arm_are_not_compared(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a", [row("mine")]), written(tmp_path / "b", [row("yours")])
    with pytest.raises(InputError, match=r"no arm in common \(mine; yours\)"):
        write_comparison(one, other, tmp_path / "x.html")


def test_the_command_writes_the_page_and_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, everything())
    assert main(["report", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(tmp_path / "latency" / "report.html")
    assert list(said["pictures"]) == NAMES
    assert main(["report", str(tmp_path / "latency" / "latency.jsonl"), "--output", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p.html")
    assert main(["report", "--compare", str(tmp_path), str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "latency" / "compare.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one run's folder, or two with --compare RUN RUN"),
        (["nowhere"], "nowhere: no latency.jsonl in it or in its folder latency"),
        (["--compare", "a", "b", "--replay", "wandb"], "--replay logs one run's rows"),
        (["--compare", "a", "b", "--card"], "--card is about one run's export"),
        (["run", "--output", "."], ".: the page cannot be written there (Is a directory)"),
        (["run", "--output", "file/page.html"], "file/page.html: the page cannot be written there"),
        (["file"], "file: line 1 is not JSON"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "run", [row("base")])
    (tmp_path / "file").write_text("no rows\n")
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_explanations_alone_are_a_report_with_causes_and_cures(tmp_path: Path) -> None:
    cause = Effect(
        layer="toggled", cause="unmerged-adapter", effect_s=0.0155, evidence="252 LoRA layers", cure="merge it",
        command="grpo-toolkit merge a b",
    )  # fmt: skip
    why = replace(
        explanations()[0], base="/models/Qwen2.5-VL-3B", trained="/out/checkpoint-500", step=500,
        low_s=0.015, high_s=0.017,
        effects=[cause, Effect(layer="unexplained", cause="unexplained", effect_s=0.0005)],
    )  # fmt: skip
    review = written(tmp_path, [why])
    text = write_report(review).read_text()
    assert figures(text) == ["waterfall"]
    assert f'<span class="figure">1.80{TIMES}</span>' in text
    assert "checkpoint-500 36.0 ms per output token, Qwen2.5-VL-3B 20.0 ms." in text
    assert "<li>step 500</li><li>explained, no arms measured beside it</li>" in text
    assert "The arms</h2>" not in text
    assert "merge it <code>grpo-toolkit merge a b</code>" in text
    assert "<b>eager attention</b> eager, not sdpa" in text
    assert "1 row in" in text
    assert [bar.label for bar in waterfall_bars(review)[1]] == [
        "Qwen2.5-VL-3B", "unmerged adapter", "unexplained", "checkpoint-500",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replay", "wandb"], "only explanations are in it, and a tracker gets measurements"),
        (["--card"], "no arm named export was measured, so there is no card to write"),
    ],
)
def test_what_explanations_alone_cannot_give_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, explanations())
    assert main(["report", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_comparison_says_which_run_has_no_measurement(tmp_path: Path) -> None:
    one, other = written(tmp_path / "first", arms()), written(tmp_path / "second", explanations())
    with pytest.raises(InputError, match=r"second/latency: only explanations are in it, and --compare needs meas"):
        write_comparison(one, other, tmp_path / "both.html")


def test_rows_that_all_failed_are_no_report(tmp_path: Path) -> None:
    failed = row("base", error="out of memory", tpot_s=None, e2e_s=None, timelines=[])
    with pytest.raises(InputError, match="no arm was measured to its end"):
        write_report(written(tmp_path, [failed]))


def test_the_page_says_when_and_with_what_it_was_measured_and_how_busy_the_machine_was(tmp_path: Path) -> None:
    busy = {"hardware": "a processor, 2 cores", "load_average": "5.20", "torch": "2.15", "grpo_toolkit": "0.1"}
    busy["grpo_toolkit_commit"] = "470c8fb01234, changed"
    text = write_report(written(tmp_path / "busy", [row("base", environment=busy), row("export")])).read_text()
    assert "<li>2026-01-02 03:04 UTC</li><li>grpo-toolkit 0.1 (470c8fb01234, changed), torch 2.15</li>" in text
    assert "This machine was busy: 5.2 processes wanted its 2 cores." in text
    idle = busy | {"load_average": "2.90"}
    text = write_report(written(tmp_path / "idle", [row("base", environment=idle), row("export")])).read_text()
    assert "was busy" not in text


def test_natural_answers_are_in_a_table_and_percentiles_are_there_or_said_why_not(tmp_path: Path) -> None:
    review = written(tmp_path / "few", everything())
    text = write_report(review).read_text()
    table = text[text.index("Answers that end where the model ends them</h3>") :].partition("</table>")[0]
    assert table.count("<tr>") == 1 + len(review.natural) == 3
    assert '<td class="text" data-name="thinking">asked for</td>' in table
    assert "No percentiles of 12 rounds: p90 from 64 rounds on, p95 from 130 rounds on" in text
    many = row("base")
    many = replace(many, tpot_s=replace(many.tpot_s, p90=0.025))
    text = write_report(written(tmp_path / "many", [many])).read_text()
    assert "Percentiles of TPOT, ms: base p90 25.0." in text
