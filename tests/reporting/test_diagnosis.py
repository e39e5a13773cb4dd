"""A diagnosis in a terminal: the words that a pipe gets, with colours, in columns, as wide as the terminal."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.reporting.terminal.diagnosis import Coloured, Plain, diagnosis_lines, paper, run_lines
from tests.support.faulty import unpack

if TYPE_CHECKING:
    from pathlib import Path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_the_words_of_a_pipe(tmp_path: Path) -> None:
    diagnosis = diagnose_checkpoint(unpack("vlm_r1_451", tmp_path / "x"))
    plain = "\n".join(diagnosis_lines(diagnosis))
    coloured = "\n".join(diagnosis_lines(diagnosis, Coloured()))
    assert "\x1b[1;33mslow\x1b[0m: \x1b[1mKV cache off in generation_config.json\x1b[0m" in coloured
    assert "\x1b" not in plain
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert shown.split() == re.sub(r"\((http\S+)\)", r"\1", plain).split()


def test_a_paragraph_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    said = ("every token recomputes the prompt", "https://example.com/a/long/address")
    assert Plain().paragraph(*said) == "  every token recomputes the prompt (https://example.com/a/long/address)"
    assert Coloured().paragraph(*said).split("\n") == [
        "  every token recomputes",
        "  the prompt",
        "  \x1b[2mhttps://example.com/a/long/address\x1b[0m",
        "",
    ]


def test_a_run_is_in_columns(tmp_path: Path) -> None:
    names = {"checkpoint-2": "vlm_r1_451", "checkpoint-10": "trl_grpo_523"}
    diagnoses = [diagnose_checkpoint(unpack(kind, tmp_path / name)) for name, kind in names.items()]
    coloured = list(run_lines(diagnoses, ["nothing else"], Coloured()))
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured]
    assert [line.split()[0] for line in shown] == ["checkpoint", "checkpoint-2", "checkpoint-10", "nothing", "NOT"]
    assert len({line.index("full model") for line in shown[1:3]} | {shown[0].index("kind")}) == 1
    first = [next(finding.code for finding in diagnosis.judged) for diagnosis in diagnoses]
    assert len({line.index(code) for line, code in zip(shown[1:3], first, strict=True)}) == 1
    assert first[1] == "config-cache-off-latent"  # what the installed version does comes first
    assert "\x1b[1;31m4 unloadable, 1 wasteful" in coloured[2]  # the colour is that of the worst


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, Coloured), ({"NO_COLOR": "1"}, Plain), ({"TERM": "dumb"}, Plain)],
    ids=["a terminal", "colours are not wanted", "a terminal without colours"],
)
def test_colours_are_for_terminals_that_want_them(
    variables: dict[str, str], expected: type[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert type(paper()) is expected
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert type(paper()) is Plain
