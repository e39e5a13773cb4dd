"""The charts: waterfalls that add up and draw no noise, phases, arms that coincide, pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.latency.rows.row import Effect, ExplanationRow
from grpo_toolkit.reporting.charts.first_token import first_token_phases
from grpo_toolkit.reporting.charts.gallery import CHARTS, write_pictures
from grpo_toolkit.reporting.charts.style import as_svg, line_look, lying_on, new_figure, styled
from grpo_toolkit.reporting.charts.waterfall import waterfall_bars, waterfall_caption
from grpo_toolkit.reporting.report.page import write_report
from tests.reporting.test_report import written
from tests.support.latency_rows import arms, everything, explanations, row

if TYPE_CHECKING:
    from pathlib import Path


def test_the_waterfall_adds_up_from_arm_to_arm(tmp_path: Path) -> None:
    metric, bars = waterfall_bars(written(tmp_path, everything()))
    assert metric == "tpot_s"
    labels = ["base", "unmerged adapter", "float32 weights", "unexplained", "plain checkpoint", "merged", "export"]
    assert [bar.label for bar in bars] == labels
    height = bars[0].value_s
    for bar in bars[1:]:
        if bar.kind == "level":
            assert bar.value_s == pytest.approx(height)
        else:
            height += bar.value_s


def test_an_explanation_of_two_folders_is_of_the_arms_that_were_in_them(tmp_path: Path) -> None:
    common = {"metric": "e2e_s", "base_s": 1.0, "trained_s": 3.0, "measured_at": "now", "session": "why"}
    cause = Effect(layer="toggled", cause="cache-off", effect_s=2.0)
    ours = ExplanationRow(base="/models/base", trained="/models/export", effects=[cause], **common)
    others = ExplanationRow(base="/a/x", trained="/b/y", effects=[cause], **common)
    review = written(tmp_path, [*arms(), ours, others])
    assert [bar.label for bar in waterfall_bars(review)[1]] == ["base", "cache off", "export"]
    text = write_report(review).read_text()
    assert "base → export: 1,000.00 → 3,000.00 ms" in text
    assert "x → y: 1,000.00 → 3,000.00 ms" in text


def test_without_an_explanation_the_waterfall_splits_at_the_first_token_and_draws_no_noise(tmp_path: Path) -> None:
    review = written(tmp_path, arms())
    metric, bars = waterfall_bars(review)
    assert metric == "e2e_s"
    kinds = [(bar.label, bar.kind) for bar in bars]
    assert kinds == [
        ("base", "level"), ("later tokens", "change"), ("within noise", "noise"), ("plain checkpoint", "level"),
        ("later tokens", "change"), ("within noise", "noise"), ("export", "level"),
    ]  # fmt: skip
    assert sum(bar.value_s for bar in bars[:3]) == pytest.approx(bars[3].value_s)
    assert sum(bar.value_s for bar in bars[3:6]) == pytest.approx(bars[6].value_s)
    for bar in bars:
        if bar.kind == "change":
            assert bar.low_s is not None
            assert bar.high_s is not None
            assert bar.low_s <= bar.value_s <= bar.high_s
            assert bar.low_s * bar.high_s > 0
    assert waterfall_caption(review) == (
        "base → plain checkpoint → export, end to end. Red adds time, teal takes it away; whiskers are 95% intervals. "
        "Hatched: no interval tells it from nothing."
    )


def test_too_few_rounds_make_no_change_between_two_levels(tmp_path: Path) -> None:
    few = [replace(one, timelines=one.timelines[:5]) for one in arms()]
    review = written(tmp_path, few)
    assert [bar.label for bar in waterfall_bars(review)[1]] == [
        "base", "too few rounds", "plain checkpoint", "too few rounds", "export",
    ]  # fmt: skip
    assert waterfall_caption(review).endswith("end to end. Hatched: too few rounds for an interval.")


def test_a_cause_that_its_interval_does_not_tell_from_nothing_is_not_drawn(tmp_path: Path) -> None:
    there, _ = explanations()
    sure, unsure, rest = there.effects
    why = replace(there, effects=[sure, replace(unsure, low_s=-0.001), rest])
    review = written(tmp_path, [why])
    bars = waterfall_bars(review)[1]
    assert [bar.label for bar in bars] == ["base", "unmerged adapter", "unexplained, within noise", "plain checkpoint"]
    assert sum(bar.value_s for bar in bars[:3]) == pytest.approx(bars[3].value_s)
    text = write_report(review).read_text()
    drawing = text[text.index('<figure id="waterfall">') :].partition("</figure>")[0]
    assert ">+12.0<" in drawing
    assert "+4.00" not in drawing


def test_the_time_to_the_first_token_is_split_without_the_tower_runs_after_it(tmp_path: Path) -> None:
    plain = row("export")
    later = [replace(t, phases_s=t.phases_s | {"vision_s": 9.0}) for t in plain.timelines]  # a lost cache
    for found in (plain, replace(plain, timelines=later)):
        phases = first_token_phases(found)
        assert sum(phases.values()) == pytest.approx(plain.ttft_s.median)
        assert phases["vision_s"] == pytest.approx(0.3 * plain.ttft_s.median)
    assert first_token_phases(replace(plain, timelines=[replace(t, phases_s={}) for t in plain.timelines])) == {}


def test_arms_that_coincide_are_both_seen(tmp_path: Path) -> None:
    assert lying_on({"a": [10.0, 20.0], "b": [10.1, 20.1], "c": [30.0, 30.0]}, 40.0) == {"b": "a"}
    assert line_look("a", {"b": "a"})["linewidth"] > 5
    text = write_report(written(tmp_path, arms())).read_text()
    drawing = text[text.index('<figure id="positions">') :].partition("</figure>")[0]
    assert ">export, as base<" in drawing
    assert ">plain checkpoint<" in drawing


def test_pictures_are_pngs_on_white_and_the_same_every_time(tmp_path: Path) -> None:
    from PIL import Image

    review = written(tmp_path, everything())
    first, second = (write_pictures(review, tmp_path / name) for name in ("a", "b"))
    assert list(first) == [chart.name for chart in CHARTS]
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
        with Image.open(path) as picture:
            assert picture.size[0] == 918
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with styled():
        figure = new_figure()
        figure.subplots().plot([1, 2], [3, 4])
        assert "<metadata" not in as_svg(figure, name="x", title="X")
    assert dict(matplotlib.rcParams) == before
