"""The command line before any model is loaded: its help, what it refuses, and how it stops."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import grpo_toolkit
from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter, named_base
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.cli import main
from grpo_toolkit.cli.main import GROUPS, VERBS, build_parser
from grpo_toolkit.cli.shell import version
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.latency.rows.store import FILE_NAME, PARTIAL_NAME, read_measurements, recover_rows
from grpo_toolkit.reporting.terminal.console import turn_progress
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines
from tests.support.faulty import unpack

if TYPE_CHECKING:
    from pathlib import Path


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_has_groups_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    assert [line for line in text.splitlines() if line.rstrip(":") in GROUPS] == [f"{group}:" for group in GROUPS]
    assert re.findall(r"^  (\w+)  +[A-Z]", text, re.MULTILINE) == list(VERBS)
    assert len(re.findall(r"^  grpo-toolkit ", text, re.MULTILINE)) == 3


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_command_has_three_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys=capsys)
    examples = re.findall(rf"^  grpo-toolkit ({name}\b.*)$", text, re.MULTILINE)
    assert len(examples) == 3
    assert max(map(len, text.splitlines())) <= 80
    for example in examples:
        arguments = shlex.split(example.partition(" > ")[0])
        found, unknown = build_parser().parse_known_args(arguments)
        assert found.run.__name__ == name
        assert unknown == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "a", "--fooo"], "error: unrecognized arguments: --fooo"),
        (["export", "a", "b", "--push-to-hub", "two/many/parts"], "'two/many/parts' is no name on the Hub"),
        (["export", "a", "b", "--push-to-hub", "me/../x"], "'me/../x' is no name on the Hub"),
        (["tune", "a", "--new-tokens", "0"], "argument --new-tokens: '0' is not a count"),
        (["tune", "a", "--new-tokens", "1"], "argument --new-tokens: '1': it takes two"),
        (["bench", "a", "--new-tokens", "8,0"], "argument --new-tokens: '0' is not a count"),
        (["bench", "a", "--rounds", "0"], "argument --rounds: '0' is not a count"),
        (["bench", "a", "--budget", "-3"], "argument --budget: '-3' is no number above 0"),
        (["bench", "a", "--gate", "1.05"], "argument --gate: gate '1.05': expected max-slowdown=RATIO"),
        (["explain", "a", "b", "--rounds", "0"], "argument --rounds: '0' is not a count"),
        (["explain", "a", "b", "--max-new-tokens", "1"], "argument --max-new-tokens: '1': it takes two"),
        (["explain", "a", "b", "--budget", "nan"], "argument --budget: 'nan' is no number above 0"),
        (["explain", "a"], "error: give a base and a trained model, or --steps"),
    ],
)
def test_wrong_arguments_show_their_own_commands_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: grpo-toolkit {arguments[0]} ")
    assert message in said


@pytest.mark.parametrize("option", ["--attn", "--with"])
def test_an_unknown_attention_is_refused_before_anything_is_loaded(
    option: str, qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        ["bench", f"a={qwen}", "--attn", "sdpa,spda"]
        if option == "--attn"
        else ["explain", str(qwen), str(qwen), "--with", "attn_implementation=spda"]
    )
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "no attention implementation 'spda'; transformers here has eager, " in said
    assert "loading" not in said


@pytest.mark.parametrize("command", ["bench", "explain"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    command: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    models = [f"a={qwen}"] if command == "bench" else [str(qwen), str(qwen)]
    assert main([command, *models, "--output", str(tmp_path / "file" / "rows" / "x")]) == 2
    said = capsys.readouterr().err
    assert "nothing can be written there" in said
    assert "loading" not in said


def test_an_interrupt_ends_at_once_with_what_there_is(qwen: Path, tmp_path: Path) -> None:
    """The first workload's figures are there; of the second, nothing."""
    command = [
        *(sys.executable, "-m", "grpo_toolkit.cli", "bench", f"a={qwen}", "--workload", "fixed", "--no-roofline"),
        *("--new-tokens", "4,900", "--prompt-tokens", "64", "--image-tokens", "0", "--rounds", "500"),
        *("--budget", "1", "--output", str(tmp_path)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "latency.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.startswith("loading a\n")
    assert "fixed: 4 new tokens" in out
    assert "900" not in out
    assert took < 10 * (1 + os.getloadavg()[0])  # two seconds on a machine that is not busy; all rounds take minutes


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_the_rounds_that_were_made_are_kept_whatever_ends_them(
    kind: signal.Signals, qwen: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "grpo_toolkit.cli", "bench", f"a={qwen}", "--workload", "fixed", "--no-roofline"),
        *("--new-tokens", "4", "--prompt-tokens", "64", "--image-tokens", "0", "--rounds", "100000"),
        *("--output", str(tmp_path)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while _rounds_in(tmp_path) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    before = _rounds_in(tmp_path)
    assert before >= 3
    began = time.monotonic()
    os.killpg(process.pid, kind)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    (row,) = load_review(tmp_path).rows
    assert row.rounds >= before
    assert len(row.timelines) == row.rounds
    if kind is signal.SIGINT:
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert "fixed: 4 new tokens" in out
        assert took < 10 * (1 + os.getloadavg()[0])
        assert [found.id for found in read_measurements(tmp_path / FILE_NAME)] == [row.id]
    else:
        assert not (tmp_path / FILE_NAME).exists()
        assert recover_rows(tmp_path) == 1  # as the next bench does
        assert [found.id for found in read_measurements(tmp_path / FILE_NAME)] == [row.id]
    assert not (tmp_path / PARTIAL_NAME).exists()


def _rounds_in(folder: Path) -> int:
    partial = folder / PARTIAL_NAME
    return read_measurements(partial)[0].rounds if partial.is_file() else 0


def test_progress_in_a_pipe_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    show = turn_progress("a, b")
    for turn in range(-2, 30):
        show("a", turn, 30)
    assert capsys.readouterr().err.splitlines() == ["loading a, b", "a: warming up"]


def test_progress_says_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr("grpo_toolkit.reporting.terminal.console.time.monotonic", lambda: next(clock))
    show = turn_progress("a")
    for turn in (-1, 0, 1):
        show("a", turn, 21)
    assert capsys.readouterr().err.endswith("a: round 2 of 21, 40 s to go\r")


def test_advice_can_be_pasted(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "a run's folder")
    advice = [line for line in diagnosis_lines(diagnose_checkpoint(folder)) if "grpo-toolkit" in line]
    commands = [shlex.split(line.partition("grpo-toolkit ")[2]) for line in advice]
    assert commands == [["repair", str(folder)], ["repair", str(folder), "--undo"]]
    assert [build_parser().parse_args(command).path for command in commands] == [folder, folder]


def test_a_base_that_is_not_here_can_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"; fetch it: hf download no/base$"):
        named_base("no/base")
    with pytest.raises(CheckpointError, match=r"Hub cache$"):
        named_base("/no/base")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "no/base"}')
    with pytest.raises(CheckpointError, match=r"; fetch it: hf download no/base$"):
        base_of_adapter(tmp_path)


def test_a_run_in_place_of_a_model_has_its_newest_checkpoint_and_its_export_suggested(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "grpo_toolkit.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"did you mean .*/checkpoint-20 or .*/export\?"):
        open_checkpoint(tmp_path)


def test_env_names_what_a_bug_report_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["env"]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"grpo_toolkit", "trl", "peft", "torch", "transformers"} <= set(names)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["env"]) == 0
    assert "torch: not installed: pip install torch" in capsys.readouterr().out


def test_the_package_has_a_version() -> None:
    assert grpo_toolkit.__version__ == version()
