"""The command line: data on standard output, talk on standard error, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def test_export_then_verify_then_bench(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = tmp_path / "export"
    assert main(["export", str(qwen), str(export), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(export)
    assert said["verification"]["passed"] is True

    assert main(["verify", str(export), "--reference", str(qwen), "--base", str(qwen)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("tensors as in the base" in line for line in lines)
    assert any("same logits as the trained policy: 0 of their spread apart" in line for line in lines)
    assert [line[:4] for line in lines] == ["ok  "] * len(lines)
    assert any("same greedy tokens" in line for line in lines)

    arguments = ["bench", f"a={qwen}", str(export), "--new-tokens", "3", "--rounds", "1", "--no-cache", "--json"]
    arguments += ["--workload", "fixed", "--prompt-tokens", "256", "--image-tokens", "16", "--no-control"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["arm"] for row in rows] == ["a", "a_no_cache", "export", "export_no_cache"]
    assert [row["proof"]["is_cached"] for row in rows] == [True, False, True, False]


def test_verify_exits_1_on_a_poisoned_folder(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = tmp_path / "poisoned"
    shutil.copytree(qwen, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"use_cache": False}))
    assert main(["verify", str(folder)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 2
    assert "generation_config.json: use_cache is False" in failed[0]
    assert "KV cache in use" in failed[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{tmp}/nowhere"], "not a folder"),
        (["verify", "{tmp}"], "this is no checkpoint"),
        (["export", "{tmp}/nowhere", "{tmp}/out"], "not a folder"),
        (["export", "{qwen}", "{tmp}/full"], "not an export of ours"),
        (["export", "{qwen}", "{tmp}/out", "--base", "no/base"], "base no/base: neither a model folder"),
        (["export", "{tmp}/odd", "{tmp}/out"], "odd: cannot be loaded"),
        (
            ["export", "{tmp}/twofold", "{tmp}/out", "--no-verify"],
            "twofold: cannot be loaded (ValueError: Cannot load",
        ),
        (["verify", "{tmp}/odd"], "no-such-model"),
        (["export", "{tmp}/cut", "{tmp}/out"], "it is cut off"),
        (["verify", "{qwen}", "--device", "cuda:77"], "--device cuda:77: not here"),
        (["bench", "{qwen}", "{qwen}"], "two models have the same name"),
        (["bench", "{qwen}", "{qwen}", "--tune"], "--tune takes one model, not 2"),
        (["bench", "name=http://127.0.0.1:9/v1", "--tune"], "http://127.0.0.1:9/v1: a server has settings of its own"),
        (["tune", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1: a server has settings of its own"),
        (["tune", "{tmp}/nowhere"], "not a folder"),
        (["bench", "{qwen}", "--image", "{tmp}/full/file"], "cannot be read as an image"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-model"}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((qwen / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((qwen / "model.safetensors").read_bytes()[:-1])
    shutil.copytree(qwen, tmp_path / "twofold")  # two forms of chat templates, which the library refuses
    (tmp_path / "twofold" / "additional_chat_templates").mkdir()
    (tmp_path / "twofold" / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    assert main([argument.format(tmp=tmp_path, qwen=qwen) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-toolkit: ")
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "full", "odd", "twofold"]


def test_no_command_prints_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: grpo-toolkit" in capsys.readouterr().err


def test_the_module_exits_as_the_console_script_does() -> None:
    for arguments, code in ((["doctor", "nowhere"], 2), (["--help"], 0)):
        done = subprocess.run([sys.executable, "-m", "grpo_toolkit.cli", *arguments], capture_output=True, check=False)
        assert done.returncode == code


def test_tune_has_an_older_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def tune_latency(model: str, **settings: Any) -> None:
        asked.append({"model": model, **settings})
        raise InputError("asked")

    monkeypatch.setattr("grpo_toolkit.latency.tune.tune.tune_latency", tune_latency)
    for flags in ([], ["--new-tokens", "8", "--image-tokens", "16", "--max-tpot", "20", "--rounds", "7"]):
        assert main(["tune", "folder", *flags]) == main(["bench", "name=folder", "--tune", *flags]) == 2
        assert asked[-1] == asked[-2]
    assert asked[0]["model"] == "folder"
    assert (asked[0]["new_tokens"], asked[0]["prompt_tokens"], asked[0]["image_tokens"]) == (64, 512, None)
    assert (asked[2]["new_tokens"], asked[2]["image_tokens"], asked[2]["max_tpot_s"]) == (8, 16, 0.02)


def test_env_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert {"hardware", "torch", "transformers", "python"} <= set(json.loads(capsys.readouterr().out))


def test_an_export_ends_with_one_table_of_what_went_in_was_put_right_was_proven_and_lies_where(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "poisoned", tmp_path / "out"
    shutil.copytree(qwen, base)
    data = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(data | {"use_cache": False}))
    assert main(["export", str(base), str(output)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{output}\n"
    rows = [line.split("│")[1].strip() for line in said.err.splitlines() if line.startswith("│")]
    assert [row for row in rows if row] == [
        "source", "base", "put right", "changed in training", "cache not switched off in the files",
        "tensors as in the base", "every stored value is finite", "nothing found by the doctor", "loads whole",
        "embeddings tied as in the base",
        "same token ids and pixel values from the processor", "same logits as the trained policy",
        "same greedy tokens as the trained policy", "KV cache in use", "same tokens with and without the cache",
        "pictures answered", "published",
    ]  # fmt: skip
    assert "generation_config.json: use_cache was false, now true" in said.err
    assert main(["export", str(base), str(output), "--overwrite", "--no-verify", "--quiet"]) == 0
    assert capsys.readouterr() == (f"{output}\n", "")


def test_a_merge_ends_with_one_table_and_the_command_that_verifies_it(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.merge.test_merge import make_adapter

    base, output = tmp_path / "poisoned", tmp_path / "a folder with blanks in its name" / "out"
    shutil.copytree(qwen, base)
    data = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(data | {"use_cache": False}))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = len(open_checkpoint(base).tensors())
    assert main(["merge", str(adapter), str(output)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{output}\n"
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.err.splitlines() if line[:1] == "│"]
    assert [name for name, _ in cells if name] == ["base", "adapter", "changed", "copied", "put right", "published"]
    figures = dict(cells)
    changed = int(figures["changed"].removesuffix(" tensors"))
    assert figures["copied"] == f"{tensors - changed} tensors"
    assert changed == 2  # a q_proj in each of two layers
    assert figures["put right"] == "generation_config.json: use_cache was false, now true"
    assert f"Merge {output}\n" in said.err
    assert " GB in " in said.err
    assert said.err.endswith(f"\nnot verified yet: grpo-toolkit verify '{output}'\n")  # unbroken, for copying
    manifest = json.loads((output / "grpo_toolkit.json").read_text())
    assert manifest["put_right"] == [
        {"file": "generation_config.json", "key": "use_cache", "found": False, "written": True}
    ]
    assert main(["merge", str(adapter), str(output), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == (f"{output}\n", "")


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_bar_shows_the_bytes_on_a_terminal(
    command: str, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of the weights is told once, in order, up to the whole."""
    from contextlib import contextmanager

    from grpo_toolkit.reporting.terminal import console
    from tests.merge.test_merge import make_adapter

    told: list[tuple[int, int]] = []
    shown: list[bool] = []

    @contextmanager
    def recorded(title: str, *, is_shown: bool) -> Any:
        shown.append(is_shown)
        yield lambda done, total: told.append((done, total))

    monkeypatch.setattr(console, "byte_progress", recorded)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source = qwen if command == "export" else make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    options = ["--no-verify"] if command == "export" else []
    assert main([command, str(source), str(tmp_path / "out"), *options]) == 0
    assert shown == [True]
    totals = {total for _, total in told}
    assert len(totals) == 1
    assert told[-1][0] == totals.pop()
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert main([command, str(source), str(tmp_path / "out"), *options, "--overwrite", "--quiet"]) == 0
    assert shown == [True, False]


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_is_published_has_the_modes_of_the_umask(
    command: str, umask: int, files: int, folders: int, qwen: Path, tmp_path: Path
) -> None:
    from tests.merge.test_merge import make_adapter

    source = qwen if command == "export" else make_adapter(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    before = os.umask(umask)
    try:
        options = ["--no-verify"] if command == "export" else []
        assert main([command, str(source), str(tmp_path / "out"), "--quiet", *options]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folders
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {files}
