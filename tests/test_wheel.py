"""The wheel alone, without any of its dependencies, is enough for the doctor; what needs more says so in a line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command in an empty environment with nothing but the wheel."""
    pytest.importorskip("hatchling", reason="builds the wheel without a network")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], check=True, cwd=ROOT, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    flags = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *flags], check=True, capture_output=True)
    return str(python.with_name("grpo-toolkit"))


def run(command: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_doctor_and_its_repairs_need_the_wheel_alone(command: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "vlm_r1_449", tmp_path / "checkpoint"))
    found = json.loads(run(command, "doctor", folder, "--json", code=1).stdout)
    assert "generation-cache-off" in {finding["code"] for finding in found["findings"]}
    assert run(command, "repair", folder, "--base", DATA / "base", code=1).stderr == ""
    assert "use_cache" not in json.loads((folder / "generation_config.json").read_text())  # as in its base


def test_what_stands_there_is_told(command: str) -> None:
    assert run(command, "--version").stdout.startswith("grpo-toolkit 0.")
    assert json.loads(run(command, "env", "--json").stdout)["torch"] == "not installed: pip install torch"


def test_a_command_that_needs_more_says_so_in_one_line(command: str) -> None:
    done = run(command, "bench", f"base={DATA / 'base'}", f"export={DATA / 'base'}", code=2)
    assert done.stdout == ""
    assert done.stderr == (
        "grpo-toolkit: this command needs transformers, which is not installed here: pip install transformers torch\n"
    )
