"""The page `report.html`: one file that says how fast the export is, why, and what was put right.

No network and no script: SVG inside, light and dark by the reader's setting, printable. Made from `latency.jsonl`, the
doctor's findings beside it and the export's manifest alone, so it can be made again at any time and anywhere.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.review import Review, arm_order, load_review, median_of
from grpo_toolkit.reporting.charts.gallery import CHARTS
from grpo_toolkit.reporting.charts.style import PALETTE, as_svg, is_variant, label_of, styled
from grpo_toolkit.reporting.charts.waterfall import arm_named
from grpo_toolkit.reporting.report.card_facts import CardFacts
from grpo_toolkit.reporting.report.folder_findings import export_manifest, findings_of
from grpo_toolkit.reporting.report.headline import headline_of, interval
from grpo_toolkit.reporting.report.model_card import write_model_card
from grpo_toolkit.reporting.report.page_facts import (
    busy_machine,
    facts_explained,
    facts_of,
    natural_lines,
    percentile_note,
)
from grpo_toolkit.reporting.report.rendering import line_of, templates
from grpo_toolkit.reporting.report.step_section import compared_steps, explained, step_section, steps_beside

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from grpo_toolkit.latency.rows.row import LatencyRow
    from grpo_toolkit.step_time.store import StepReview

REPORT_FILE: Final = "report.html"
_NAME_LETTERS: Final = 24
"""Of a run's name, from its end: more would leave a chart's labels no room for the chart."""

COMPARED: Final = ("tpot", "positions", "distributions", "lengths", "batches")
"""Charts that show two runs side by side; the others are about one run."""


def write_report(
    run: Review | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    results: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Write the report of a run: one HTML file.

    Explanations alone are a report too: their waterfall, causes and cures.

    Args:
        run: an output folder, its `latency` folder or `latency.jsonl`; or the rows, read already.
        path: the page; by default `report.html` beside the rows.
        results: figures before and after the training by name, such as {"held-out accuracy": (0.495, 0.92)}; they go
            into the export's page (its README.md), which is written again.

    Returns:
        The page.

    Raises:
        InputError: no rows, neither a measurement nor an explanation in them, or `results` without an export.
    """
    review = run if isinstance(run, Review) else load_review(run)
    if not review.arms and not review.explanations:
        raise InputError(f"{review.path}: no arm was measured to its end, so there is nothing to report")
    manifest, found, steps = export_manifest(review), findings_of(review), steps_beside(review.path)
    content = _page(review) | {
        "steps": None if steps is None else step_section(steps),
        "diagnoses": [{"arm": label_of(arm), **found[arm]} for arm in sorted(found, key=arm_order)],
        "put_right": [
            {name: str(repair.get(name, "")) for name in ("file", "key", "found", "written")}
            for repair in (manifest or {}).get("put_right") or []
        ],
        "checks": [] if manifest is None else ((manifest.get("verification") or {}).get("checks") or []),
        "has_manifest": manifest is not None,
    }
    page = _render(content, review.path / REPORT_FILE if path is None else Path(path))
    if results is not None:
        export = next((row.path for row in review.arms if row.arm == "export"), None)
        if export is None:
            raise InputError(f"{review.path}: no arm named export was measured, so there is no page for the results")
        write_model_card(export, review, facts=CardFacts(results=results))
    return page


def write_comparison(one: Review, other: Review, path: Path) -> Path:
    """Write the report of two runs side by side. They did not take turns, which the page says.

    Raises:
        InputError: one of them has no measurement, or they have no arm in common.
    """
    for review in (one, other):
        if not review.arms:
            lack = "only explanations are in it" if review.explanations else "no arm was measured to its end"
            raise InputError(f"{review.path}: {lack}, and --compare needs measurements: grpo-toolkit bench makes them")
    names = _two_names(one.path, other.path)
    common = [row.arm for row in one.arms if row.arm in {row.arm for row in other.arms}]
    drawn = [arm for arm in common if not is_variant(arm)] or common
    if not common:
        found = ", ".join(row.arm for row in one.arms), ", ".join(row.arm for row in other.arms)
        raise InputError(f"{one.path} and {other.path} have no arm in common ({found[0]}; {found[1]})")
    rows, newest = [], []
    for name, review in zip(names, (one, other), strict=True):
        for row in review.rows:
            if row.arm in drawn:
                run = replace(row, arm=f"{row.arm} ({name})", session=f"compared {row.session}", ratios=[], step=None)
                rows.append(run)
                if row in review.arms:
                    newest.append(replace(run, session="compared", workload=one.arms[0].workload))
    both = Review(path=other.path, rows=[*rows, *sorted(newest, key=lambda row: arm_order(row.arm))])
    pairs = [({r.arm: r for r in one.arms}[arm], {r.arm: r for r in other.arms}[arm]) for arm in common]
    content = _page(both, only=COMPARED) | {
        "title": f"{names[0]} and {names[1]}",
        "headline": None,
        "compared": {"names": names, "lines": [_change(mine, theirs) for mine, theirs in pairs]},
        "is_same_hardware": len({run.arms[0].environment.get("hardware") for run in (one, other)}) == 1,
        **_of_both(names, (one, other)),
    }
    sides = steps_beside(one.path), steps_beside(other.path)
    if sides[0] is not None and sides[1] is not None:
        content |= {"steps_compared": compared_steps(sides[0], sides[1]), "compared_names": names}
    return _render(content, path)


def _of_both(names: Sequence[str], reviews: Sequence[Review]) -> dict[str, Any]:
    """Return what a page of two runs says of each: facts, a busy machine, versions, and how to make it again."""
    runs = list(zip(names, reviews, strict=True))
    busy = [f"{name}: {said}" for name, review in runs if (said := busy_machine(review.arms[0]))]
    return {
        "facts": [f"{name}: {', '.join(facts_of(review.arms[0]))}" for name, review in runs],
        "busy": " ".join(busy),
        "sources": [_source(review) for review in reviews],
        "again": _command("report", "--compare", *(review.path for review in reviews)),
        "environment": {
            f"{name}, {key}": value for name, review in runs for key, value in review.arms[0].environment.items()
        },
    }


def _source(review: Review) -> tuple[int, str]:
    return len(review.rows) + len(review.explanations), str(review.path)


def _command(*words: object) -> str:
    return shlex.join(["grpo-toolkit", *map(str, words)])


def write_step_report(steps: StepReview, path: Path | None = None) -> Path:
    """Write the report of a run that has steps alone; `path` defaults to `report.html` beside its rows.

    Raises:
        InputError: no step in it has phases.
    """
    section = step_section(steps)
    if section is None:
        raise InputError(f"{steps.path}: no step in it has phases, so there is nothing to report")
    content = _steps_alone(steps, steps.path.resolve().name) | {"steps": section}
    return _render(content, steps.path / REPORT_FILE if path is None else path)


def write_step_comparison(one: StepReview, other: StepReview, path: Path) -> Path:
    """Write the comparison of two runs that have steps alone.

    Raises:
        InputError: one of them has no steps with phases.
    """
    names = _two_names(one.path, other.path)
    content = _steps_alone(other, f"{names[0]} and {names[1]}") | {
        "sources": [(len(steps.steps) + len(steps.explanations), str(steps.path)) for steps in (one, other)],
        "again": _command("report", "--compare", one.path, other.path),
    }
    return _render(content | {"steps_compared": compared_steps(one, other), "compared_names": names}, path)


def _steps_alone(steps: StepReview, title: str) -> dict[str, Any]:
    row = explained(steps)
    environment = {} if row is None else row.environment
    return {
        "title": title,
        "is_steps_alone": True,
        "palette": PALETTE,
        "headline": None,
        "facts": [fact for fact in (environment.get("hardware"),) if fact],
        "lines": [],
        "ratios": [],
        "charts": [],
        "missing": [],
        "failed": [],
        "explanations": [],
        "sources": [(len(steps.steps) + len(steps.explanations), str(steps.path))],
        "again": _command("report", steps.path),
        "environment": environment,
        "label_of": label_of,
    }


def _two_names(one: Path, other: Path) -> tuple[str, str]:
    """Return what tells two runs apart: their folders' names, or as much of the paths as differs."""
    mine, theirs = (path.resolve().parent if path.name == "latency" else path.resolve() for path in (one, other))
    while mine.name == theirs.name and mine.parent != mine:
        mine, theirs = mine.parent, theirs.parent
    first, second = mine.name[-_NAME_LETTERS:] or "first", theirs.name[-_NAME_LETTERS:] or "second"
    return (first, second) if first != second else (f"{first} 1", f"{second} 2")


def _change(before: LatencyRow, after: LatencyRow) -> dict[str, Any]:
    cells = []
    for metric, name in {"ttft_s": "TTFT ms", "tpot_s": "TPOT ms", "e2e_s": "E2E ms"}.items():
        old, new = median_of(getattr(before, metric), 1e3), median_of(getattr(after, metric), 1e3)
        cells.append({"name": name, "old": old, "new": new, "ratio": None if not old or new is None else new / old})
    return {"arm": label_of(before.arm), "cells": cells}


def _page(review: Review, only: Sequence[str] | None = None) -> dict[str, Any]:
    charts, missing = [], []
    with styled():
        for chart in CHARTS:
            if only is not None and chart.name not in only:
                continue
            figure = chart.draw(review)
            if figure is None:
                missing.append(chart)
            else:
                charts.append(
                    {
                        "about": chart,
                        "caption": chart.caption_of(review),
                        "svg": as_svg(figure, name=chart.name, title=chart.title),
                    }
                )
    return {
        "title": review.path.resolve().parent.name if review.path.name == "latency" else review.path.resolve().name,
        "palette": PALETTE,
        "headline": headline_of(review),
        "facts": facts_of(review.arms[0]) if review.arms else facts_explained(review.explanations[-1]),
        "busy": busy_machine(review.arms[0] if review.arms else review.explanations[-1]),
        "percentiles": percentile_note(review.arms),
        "natural": natural_lines(review),
        "lines": [line_of(row) for row in review.arms],
        "ratios": [(label_of(row.arm), ratio, interval(ratio)) for row, ratio in review.ratios],
        "charts": charts,
        "missing": missing,
        "failed": [row for row in review.rows if row.error is not None],
        "explanations": [
            (explanation, *(label_of(arm_named(review, end)) for end in (explanation.base, explanation.trained)))
            for explanation in review.explanations[-2:]
        ],
        "sources": [_source(review)],
        "again": _command("report", review.path),
        "environment": review.arms[0].environment if review.arms else review.explanations[-1].environment,
        "label_of": label_of,
    }


def _render(content: dict[str, Any], path: Path) -> Path:
    defaults: dict[str, Any] = {"is_same_hardware": True, "has_manifest": False, "is_steps_alone": False}
    defaults |= {"compared": None, "steps": None, "steps_compared": None, "compared_names": ()}
    defaults |= {"busy": "", "percentiles": ""}
    empty: dict[str, list[Any]] = {"natural": [], "diagnoses": [], "put_right": [], "checks": []}
    text = templates(autoescape=True).get_template("report.html.jinja").render(defaults | empty | content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written there ({error.strerror or error})") from error
    return path


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The files drawn for a review: the report, and the pictures by chart."""

    report: Path | None
    pictures: Mapping[str, Path]
