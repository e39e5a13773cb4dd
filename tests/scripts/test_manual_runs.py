"""Commands and code blocks of the README and the manual: all of them parse, and a handful is run on a tiny model."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import grpo_toolkit
from grpo_toolkit.cli import main, run
from grpo_toolkit.cli.main import build_parser
from scripts.docs.site import pages
from tests.support.faulty import sick_checkpoint
from tests.support.model_servers import build_adapter
from tests.support.step_rows import write_run
from tests.support.training import LANGUAGE_QV

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
TEXTS = WRITTEN | pages()
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(?:^|\s)#(?= ).*$")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(text) if kind == language]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in blocks for a shell, and in those that are marked by four spaces."""
    indented = re.findall(r"^    (.*)$", _BLOCK.sub("", text), re.MULTILINE)
    for block in [*blocks(text, "bash"), "\n".join(indented)]:
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && ", _COMMENT.sub("", line)):
                if re.match(r"(grpo-toolkit|bash|python|accelerate|sbatch|[A-Z_]+=\S+) ", command):
                    words = shlex.split(command.partition(" > ")[0])
                    yield words[1:] if "=" in words[0] else words


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_parses(name: str) -> None:
    for words in commands(TEXTS[name]):
        program, *arguments = words
        if program == "grpo-toolkit" and not {"...", "COMMAND", "[OPTIONS]"} & set(arguments):
            _, unknown = build_parser().parse_known_args(arguments)
            assert unknown == [], words
        for place, word in enumerate(arguments):
            if word.startswith(("recipes/", "scripts/")) and "/" in word:
                assert (ROOT / word).exists(), words
            if word == "-m" and arguments[place + 1].startswith(("scripts.", "grpo_toolkit.")):
                module = ROOT / arguments[place + 1].replace(".", "/")
                assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
                if module.name == "run":
                    run.build_parser().parse_args(arguments[place + 2 :])


def test_every_block_for_a_shell_is_one() -> None:
    for name, text in WRITTEN.items():
        for block in blocks(text, "bash"):
            done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), f"{name}: {block}"


@pytest.mark.parametrize("name", [name for name, text in WRITTEN.items() if blocks(text, "python")])
def test_every_block_of_python_compiles_and_names_what_there_is(name: str) -> None:
    for block in blocks(WRITTEN[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_toolkit"):
                assert node.module == "grpo_toolkit", block
                assert {alias.name for alias in node.names} <= set(grpo_toolkit.__all__)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in grpo_toolkit.__all__:
                given = {keyword.arg for keyword in node.keywords}
                assert given <= set(inspect.signature(getattr(grpo_toolkit, node.func.id)).parameters), block


def test_the_readme_is_one_page() -> None:
    assert len(WRITTEN["README.md"].splitlines()) <= 150


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the manual's capitals stand for."""
    (tmp_path / "BASE").symlink_to(base, target_is_directory=True)
    sick_checkpoint(tmp_path / "CHECKPOINT", base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_block(name: str, beginning: str) -> list[int]:
    """Run the block of a page that begins with a command, and return the exit codes."""
    (block,) = [body for body in blocks(WRITTEN[name], "bash") if body.startswith(beginning)]
    return [main(words[1:]) for words in commands(f"```bash\n{block}```\n")]


def test_the_readmes_way_for_a_trained_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_block("README.md", "grpo-toolkit doctor") == [1, 1, 0, 0]  # what needs --rewrite-weights is left
    assert (here / "out" / "export" / "grpo_toolkit.json").is_file()
    assert main(["doctor", "out/export", "--base", "BASE"]) == 0


def test_a_checkpoint_is_fixed_and_put_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in here.glob("CHECKPOINT/*") if path.is_file()}
    assert run_block("docs/guides/fix_a_checkpoint.md", "grpo-toolkit doctor CHECKPOINT --base BASE\n") == [1, 1, 1, 0]
    assert {path.name: path.read_bytes() for path in here.glob("CHECKPOINT/*") if path.is_file()} == before
    (python,) = blocks(WRITTEN["docs/guides/fix_a_checkpoint.md"], "python")
    capsys.readouterr()
    exec(python, {})
    assert "wasteful config-cache-off-latent KV cache off in config.json, not yet live" in capsys.readouterr().out


def test_an_adapter_is_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "CHECKPOINT").rename(here / "full")
    build_adapter(here / "BASE", LANGUAGE_QV).rename(here / "CHECKPOINT")
    assert run_block("docs/background/merge.md", "grpo-toolkit merge") == [0]


def test_a_runs_steps_are_explained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "RUN")
    write_run(here / "OTHER_RUN")
    (block,) = blocks(WRITTEN["docs/guides/step_time.md"], "bash")
    explain, report, compare, _ = commands(f"```bash\n{block}```\n")
    assert main(explain[1:]) == 1
    assert "one attention call" in capsys.readouterr().out
    assert main(report[1:]) == 0
    assert main(compare[1:]) == 0
