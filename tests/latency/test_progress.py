"""The progress bar of the public functions: in a terminal or a notebook, and off."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.latency.bench.progress import shown

if TYPE_CHECKING:
    from grpo_toolkit.latency.bench.progress import Progress


def answer_all(progress: Progress | None) -> None:
    assert progress is not None
    for turn in (-1, 0, 1):
        for arm in ("base", "export"):
            progress(arm, turn, 2)


def test_a_bar_counts_the_answers_of_all_arms(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True, ["base", "export"]) as progress:
        answer_all(progress)
    said = capsys.readouterr().err
    assert "loading base, export" in said
    assert "warming up base" in said
    assert "0/4" in said  # further ones may come faster than they are drawn


@pytest.mark.parametrize(("is_terminal", "is_notebook"), [(False, False), (True, False), (False, True)])
def test_by_default_it_is_shown_where_a_person_sees_it(
    is_terminal: bool, is_notebook: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with shown(None, ["base"]) as progress:
        assert (progress is not None) == (is_terminal or is_notebook)
    with shown(False, ["base"]) as progress:
        assert progress is None
    assert bool(capsys.readouterr().err) == (is_terminal or is_notebook)


def test_a_function_is_called_as_it_is() -> None:
    turns: list[tuple[str, int, int]] = []
    with shown(lambda *turn: turns.append(turn), ["base"]) as progress:
        answer_all(progress)
    assert turns[0] == ("base", -1, 2)
    assert len(turns) == 6
