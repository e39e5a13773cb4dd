"""The speed of `grpo-toolkit doctor`, as ratios measured in one run.

    python -m scripts.benchmarks.doctor

Cold starts take turns with `python -c "import json"` and are compared by their medians, so a busy machine slows both.
What Python compiled is kept for the next process, as it is for who installed the package.
Memory is the peak of the process. The 72B folder has the real headers of 31 shards over sparse files.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.models.published_shapes import SHAPES, write_weights

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests" / "data" / "published"
DOCTOR = [sys.executable, "-c", "import sys; from grpo_toolkit.cli import main; sys.exit(main())", "doctor"]


def build(name: str, folder: Path, *, shards: int) -> Path:
    shutil.copytree(PUBLISHED / name, folder)
    config = json.loads((folder / "config.json").read_text())
    write_weights(folder, SHAPES[config["model_type"]](config), shards=shards)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"vocab": {}}}\n')
    return folder


def build_run(folder: Path, count: int) -> Path:
    """Write a run whose checkpoints all carry the fault of VLM-R1's."""
    first = build("qwen2_5_vl_3b", folder / "checkpoint-1", shards=2)
    generation = json.loads((first / "generation_config.json").read_text()) | {"use_cache": False}
    (first / "generation_config.json").write_text(json.dumps(generation))
    for number in range(2, count + 1):
        copy = folder / f"checkpoint-{number}"
        copy.mkdir()
        for path in first.iterdir():
            if path.suffix == ".safetensors":  # copied as a header over a hole: shutil would write the zeros
                with path.open("rb") as source, (copy / path.name).open("wb") as target:
                    target.write(source.read(256 * 1024))
                    target.truncate(path.stat().st_size)
            else:
                shutil.copyfile(path, copy / path.name)
    return folder


def timed(command: list[str], *, terminal: bool = False) -> float:
    """Return the seconds of one process, on a terminal of its own if asked."""
    begin = time.perf_counter()
    if terminal:
        pid, master = pty.fork()
        if pid == 0:
            os.execv(command[0], command)
        try:
            while os.read(master, 65_536):
                pass
        except OSError:  # the terminal is closed when the process ends
            pass
        os.waitpid(pid, 0)
        os.close(master)
    else:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - begin


def peak_megabytes(folder: Path) -> float:
    """Return one diagnosis's peak of resident memory, as the process itself reads it (a parent's is inherited)."""
    code = (
        "import sys; from grpo_toolkit.cli import main; main(['doctor', sys.argv[1]])\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return int(done.stderr.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--checkpoints", type=int, default=200)
    arguments = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="bench-doctor-") as scratch:
        large = build("qwen2_5_vl_72b", Path(scratch, "72b"), shards=31)
        run = build_run(Path(scratch, "run"), arguments.checkpoints)
        arms = {
            "json": ([sys.executable, "-c", "import json"], False),
            "doctor": ([*DOCTOR, str(large)], False),
            "doctor_json": ([*DOCTOR, str(large), "--json"], False),
            "doctor_terminal": ([*DOCTOR, str(large)], True),
            "run": ([*DOCTOR, str(run)], False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(arguments.rounds + 1):
            for name, (command, terminal) in arms.items():
                taken = timed(command, terminal=terminal)
                if number > 0:  # the first round warms the disk cache
                    seconds[name].append(taken)
        memory = {"doctor": peak_megabytes(large), "run": peak_megabytes(run)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        name: {
            "median_s": round(medians[name], 4),
            "times_json": round(medians[name] / medians["json"], 2),
        }
        for name in arms
    }
    for name, peak in memory.items():
        result[name]["peak_mb"] = round(peak, 1)
    print(json.dumps({"rounds": arguments.rounds, "checkpoints": arguments.checkpoints, **result}, indent=2))


if __name__ == "__main__":
    main()
