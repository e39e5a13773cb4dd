"""`grpo-toolkit bench`: what it measures, prints and leaves on disk, and what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.cli.bench_arguments import named_model
from grpo_toolkit.latency.rows.store import read_measurements

if TYPE_CHECKING:
    from pathlib import Path

FAST = ["--rounds", "1", "--prompt-tokens", "200", "--image-tokens", "16", "--new-tokens", "3"]


def test_both_workloads_and_every_batch_size_and_cache(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max-new-tokens", "5", "--batch-size", "1,2", "--cache", "dynamic,static", "--output", str(tmp_path)]
    assert main(["bench", f"base={qwen}", *FAST, *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = said["rows"]
    workloads = ["fixed", "natural", "natural_thinking"]
    assert [(row["workload"]["name"], row["workload"]["batch_size"], row["arm"]) for row in rows] == [
        (name, size, arm)
        for names in (workloads[:1], workloads[1:])
        for size in (1, 2)
        for name in names
        for arm in ("base_dynamic", "base_static")
    ]
    assert [row["workload"]["thinking"] for row in rows] == [False] * 6 + [True] * 2 + [False] * 2 + [True] * 2
    assert len({row["session"] for row in rows}) == 4  # with and without the instruction to think in turns
    assert {row["tokens"]["output"]["median"] for row in rows[:4]} == {3.0}
    assert all(row["roofline"]["floor_tpot_s"] > 0 for row in rows)
    assert [control["arm"] for control in said["controls"]] == ["control"] * 6
    on_disk = [row.to_json() for row in read_measurements(tmp_path / "latency.jsonl")]
    assert [row for row in on_disk if row["arm"] != "control"] == rows
    assert [row for row in on_disk if row["arm"] == "control"] == said["controls"]

    # What was measured can be compared again without a model.
    assert main(["bench", str(tmp_path / "latency.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == said
    assert main(["bench", str(tmp_path / "latency.jsonl"), str(qwen)]) == 2
    assert "cannot be mixed" in capsys.readouterr().err


def test_prompts_from_a_file_with_their_images(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (112, 56), (200, 10, 10)).save(tmp_path / "red.png")
    lines = [{"prompt": "What is this?", "image": "red.png"}, {"prompt": [{"role": "user", "content": "And?"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags = ["--prompts", str(tmp_path / "prompts.jsonl"), "--workload", "natural", "--thinking", "off"]
    assert main(["bench", f"base={qwen}", "--rounds", "2", "--max-new-tokens", "4", *flags, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert [timeline["image_tokens"] for timeline in row["timelines"]] == [8, 0]
    assert row["workload"]["kind"] == "natural"


def test_a_table_and_its_verdicts_for_a_person(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FAST, "--workload", "fixed", "--no-cache", "--no-roofline", "--no-control"]
    assert main(["bench", f"base={qwen}", *flags]) == 0
    said = capsys.readouterr().out
    assert "fixed: 3 new tokens after 200, batch 1" in " ".join(said.split())
    assert "base_no_cache / base, TPOT: " in said
    assert said.count("(no interval, 1 round): cannot tell") == 3


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("a=/models/base", ("a", "/models/base")),
        ("/models/a=b/base", ("base", "/models/a=b/base")),
        ("vllm=http://host:8000/v1", ("vllm", "http://host:8000/v1")),
        ("http://host.of.mine:8000/v1", ("host_of_mine:8000", "http://host.of.mine:8000/v1")),
        ("http://host:8000/v1#qwen", ("qwen", "http://host:8000/v1#qwen")),
    ],
)
def test_how_models_are_named(item: str, expected: tuple[str, str]) -> None:
    assert named_model(item) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-tokens", "1"], "no image of this model has 1 tokens"),
        (["--prompt-tokens", "20"], "a prompt of 20 tokens has no room"),
        (["--cache", "paged"], "no cache called 'paged'"),
        (["--prompts", "{tmp}/nowhere"], "cannot be read"),
        (["--prompts", "{tmp}/text"], "line 1 is not JSON"),
        (["--prompts", "{tmp}/rows"], 'line 1 has no "prompt"'),
        (["--prompts", "{tmp}/empty"], "holds no prompts"),
        (["--prompts", "{tmp}/image"], "cannot be read as an image"),
    ],
)
def test_wrong_use_is_one_line(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    files: dict[str, Any] = {"text": "hello", "rows": '{"question": 1}', "empty": "\n", "image": '{"prompt": "?", '}
    files["image"] += '"image": "text"}'
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    given = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["bench", str(qwen), "--workload", "fixed", "--rounds", "1", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-toolkit: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--new-tokens", "x"], ["--workload", "other"]])
def test_a_flag_that_is_none_is_refused_before_anything_is_loaded(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "nowhere", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err
