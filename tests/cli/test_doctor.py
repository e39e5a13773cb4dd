"""`grpo-toolkit doctor` and `repair`: data, words, exit codes, a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import ALL_RULES, diagnose_model
from tests.support.faulty import unpack
from tests.support.published import build_published

ROOT = Path(__file__).resolve().parents[2]
NEED_BASE = sum(rule.needs_base for rule in ALL_RULES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("base", tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a sick checkpoint, a well one, one half-written, and things that are none."""
    folder = tmp_path / "run"
    unpack("vlm_r1_451", folder / "checkpoint-2")
    unpack("base", folder / "checkpoint-10")
    (folder / "checkpoint-12").mkdir()
    (folder / "checkpoint-2-export").mkdir()
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_json_is_one_object(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    assert main(["doctor", str(folder), "--base", str(base), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "full model"
    assert said["base"] == str(base)
    assert said["clean"] is False
    assert said["findings"][0] == {
        "code": "generation-cache-off",
        "severity": "slow",
        "file": "generation_config.json",
        "key": "use_cache",
        "found": False,
        "expected": "absent, as in the base",
        "effect": "every token recomputes the whole prompt, and a vision model re-encodes the image for each of them",
        "evidence": "https://github.com/om-ai-lab/VLM-R1/issues/229",
        "repairable": True,
        "rewrites_weights": False,
        "readers": "transformers",
        "concerns": True,
    }


def test_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    assert main(["doctor", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: 1 slow, 1 wasteful, 1 note"
    assert lines[3:5] == [
        "slow: KV cache off in generation_config.json [generation-cache-off]",
        "  generation_config.json: use_cache: false, expected true",
    ]
    assert lines[-2:] == [
        f"2 of these can be mended: grpo-toolkit repair {folder}",
        f"  and put back as it was: grpo-toolkit repair {folder} --undo",
    ]
    assert [line for line in lines if "NOT COMPARED" in line] == [lines[2]]
    assert lines[2].endswith(f"({NEED_BASE} rules); pass --base FOLDER")


def test_clean_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build_published("llama_3_2_1b", tmp_path / "x")
    assert main(["doctor", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: clean"
    assert main(["repair", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: nothing to mend\n"


def test_a_run_is_one_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in said[:2]] == [
        ["checkpoint-2", "full model", "1 slow, 1 wasteful, 1 note", "generation-cache-off, config-cache-off-latent"],
        ["checkpoint-10", "full model", "clean", ""],
    ]
    assert "checkpoint-12: no config.json" in said[2]
    assert len(said) == 4
    assert main(["doctor", str(run), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [(checkpoint["path"], checkpoint["findings"]) for checkpoint in data["checkpoints"]] == [
        (str(run / "checkpoint-2"), 3),
        (str(run / "checkpoint-10"), 0),
    ]
    assert {finding["checkpoint"] for finding in data["findings"]} == {"checkpoint-2"}


def test_a_run_is_mended_and_undone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "checkpoint-2" / "generation_config.json").read_bytes()
    assert main(["repair", str(run)]) == 0
    said = capsys.readouterr()
    assert "mended 2 findings in 2 files" in said.out
    assert "passed over" in said.err
    assert main(["doctor", str(run)]) == 0
    assert main(["repair", str(run), "--undo"]) == 0
    assert (run / "checkpoint-2" / "generation_config.json").read_bytes() == before


def test_a_run_that_holds_its_last_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = unpack("vlm_r1_451", tmp_path / "run")
    unpack("base", run / "checkpoint-1")
    assert main(["doctor", str(run)]) == 1
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
        "checkpoint-1",
        "run",
        "NOT COMPARED (2 of 2): no base was named, and none is recorded here, so nothing was compared with one "
        f"({NEED_BASE} rules); pass --base FOLDER",
    ]
    assert main(["repair", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"{run / 'checkpoint-1'}: nothing to mend", f"{run}: mended 2 findings in 2 files"]
    assert main(["doctor", str(run)]) == 0
    assert main(["repair", str(run), "--undo", "--json"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 1


def test_repair_says_what_it_does(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("trl_grpo_523", tmp_path / "x")
    assert main(["repair", str(folder), "--base", str(base), "--dry-run"]) == 1
    dry = capsys.readouterr().out
    assert '-  "use_cache": false,' in dry
    assert f"{folder}: would mend 4 findings in 5 files" in dry
    assert main(["repair", str(folder), "--base", str(base)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{folder}: mended 4 findings in 5 files"
    assert said[-2].startswith("left: wider-than-base: ")
    assert said[-2].endswith("(--rewrite-weights mends it)")
    command = f"grpo-toolkit repair {folder} --base {base} --rewrite-weights"
    assert said[-1] == f"exit code 1, because of what is left; one of these can be mended: {command}"
    assert main(["repair", str(folder), "--base", str(base)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"{folder}: nothing to mend without --rewrite-weights", *said[-2:]]
    assert main(["repair", str(folder), "--base", str(base), "--rewrite-weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == ["model.safetensors"]
    assert main(["repair", str(folder), "--undo"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: put back config.json, model.safetensors, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "{tmp}/nowhere"], "not a folder"),
        (["doctor", "{tmp}"], "nothing to examine"),
        (["doctor", "{tmp}/file"], "not a folder"),
        (["doctor", "{base}", "--base", "{tmp}"], "neither a model folder"),
        (["doctor", "{base}", "--base", "no/such"], "neither a model folder"),
        (["doctor", "{tmp}/runs"], "nothing to examine"),
        (["repair", "{tmp}/nowhere"], "not a folder"),
        (["repair", "{base}", "--undo"], "no repair to undo"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "runs" / "checkpoint-1").mkdir(parents=True)
    assert main([argument.format(tmp=tmp_path, base=base) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("grpo-toolkit: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", [["doctor"], ["repair", "--dry-run"]])
def test_a_terminal_gets_colour_and_nothing_dangerous(command: list[str], tmp_path: Path) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"use_cache": False, "do_sample": "[bold]\x1b[2J\x07false[/bold]"}
    (folder / "generation_config.json").write_text(json.dumps(config))
    shown = _on_a_terminal([*command, str(folder)])
    assert "\x1b[1" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    if command == ["doctor"]:
        assert "[bold]" in shown
        assert "every token recomputes the whole prompt" in " ".join(shown.split())


def _on_a_terminal(arguments: list[str]) -> str:
    code = "import sys; from grpo_toolkit.cli import main; sys.exit(main(sys.argv[1:]))"
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", "COLUMNS": "200"})
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    shown = b""
    try:
        while block := os.read(master, 65_536):
            shown += block
    except OSError:  # closed by the end of the process
        pass
    os.waitpid(pid, 0)
    os.close(master)
    return shown.decode()


def test_only_the_standard_library_is_imported(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    code = (
        "import sys; from grpo_toolkit.cli import main; main(['doctor', sys.argv[1], '--json'])\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names, file=sys.stderr)"
    )
    command = [sys.executable, "-S", "-c", code, str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert set(done.stderr.split()) == {"__main__", "grpo_toolkit"}


def test_a_pipe_that_closes_early_is_no_error(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    command = [
        sys.executable,
        "-c",
        "from grpo_toolkit.cli import main; raise SystemExit(main())",
        "doctor",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head -0` does
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_a_base_that_is_the_folder_itself_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "x")
    for command in (["doctor"], ["repair", "--dry-run"]):
        assert main([*command, str(folder), "--base", str(folder)]) == 2
        assert "is the folder itself" in capsys.readouterr().err
    assert diagnose_model(folder, base=folder).base is None  # inside, it is as good as none


def test_a_finding_is_explained_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--explain", "rope-parameters-alone"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("unloadable: rotary settings in the form of transformers 5 alone [rope-parameters-alone]")
    assert "repair: rope_scaling and rope_theta written beside it" in said
    for rule in ALL_RULES:
        assert main(["doctor", "--explain", rule.code, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["effect"] == rule.effect
    assert main(["doctor", "--explain", "rope-parameter-alone"]) == 2
    assert "near it: rope-parameters-alone" in capsys.readouterr().err
    assert main(["doctor"]) == 2
    assert "name a folder, or a finding: --explain CODE" in capsys.readouterr().err
