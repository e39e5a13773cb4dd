"""A script that knows nothing of us, run with our callbacks in its trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from grpo_toolkit import diagnose_checkpoint
from grpo_toolkit.checkpoint.manifest import manifest_of
from grpo_toolkit.cli import run
from tests.support.models import build_llama
from tests.support.training import rows

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack

SCRIPT = """
import os
import sys

assert "transformers" not in sys.modules, "a script sets environment variables before it imports"
base, out = sys.argv[1:]

import hashlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained(base)
arguments = TrainingArguments(
    output_dir=out, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True,
    save_strategy="steps", save_steps=2, disable_tqdm=True, gradient_checkpointing=True,
)
rows = [{"input_ids": [1, 2, 3, index], "labels": [1, 2, 3, index]} for index in range(8)]
trainer = Trainer(
    model=model, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base),
    data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
)
trainer.train()
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print("DIGEST", digest.hexdigest())
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("bases") / "llama")


def python(*command: str) -> Any:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)


def test_a_script_trains_the_same_and_its_saves_are_right(llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    plain = python(str(script), str(llama), str(tmp_path / "plain"))
    options = tmp_path / "callbacks.yaml"
    options.write_text("KVCacheCallback: {generation_overrides: {repetition_penalty: 1.25}, strict: true}\n")
    ours = python(
        "-m", "grpo_toolkit.cli.run", "--callbacks", str(options), str(script), str(llama), str(tmp_path / "ours")
    )
    assert ours.returncode == 0, ours.stderr
    assert "added to Trainer: KVCacheCallback" in ours.stderr
    [digest] = [line for line in plain.stdout.splitlines() if line.startswith("DIGEST")]
    assert digest in ours.stdout.splitlines()
    generation = json.loads((tmp_path / "ours" / "checkpoint-2" / "generation_config.json").read_text())
    assert generation["repetition_penalty"] == 1.25
    assert diagnose_checkpoint(tmp_path / "ours" / "checkpoint-2", base=llama).is_clean


def test_trls_own_script_trains_the_same_saves_right_and_exports(qwen: Path, tmp_path: Path) -> None:
    """With the flags that a user of `trl grpo` gives, and rows with images from a folder of parquet files."""
    trl = pytest.importorskip("trl")
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("the tiny model samples image tokens, which older TRL stops on")
    (tmp_path / "data").mkdir()
    rows().to_parquet(tmp_path / "data" / "train.parquet")
    flags = {
        "model_name_or_path": qwen,
        "dataset_name": tmp_path / "data",
        "reward_funcs": "scripts.models.tiny_training.length_reward",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 7,
    }
    command = ["trl.scripts.grpo", *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    added = ["grpo_toolkit.cli.run", "--callback", "KVCacheCallback", "--callback", "ExportCallback"]
    started = {  # side by side: most of the time goes into imports
        name: subprocess.Popen(
            [sys.executable, "-m", *launcher, *command, "--output_dir", str(tmp_path / name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, launcher in (("plain", []), ("ours", added))
    }
    said = {name: process.communicate(timeout=300)[1] for name, process in started.items()}
    assert {name: process.returncode for name, process in started.items()} == {"plain": 0, "ours": 0}, said
    assert "added to GRPOTrainer: KVCacheCallback, ExportCallback" in said["ours"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "ours")]
    assert weights[0] == weights[1]
    findings = {name: diagnose_checkpoint(tmp_path / name, base=qwen) for name in ("plain", "ours", "ours/export")}
    assert not findings["plain"].is_clean
    assert findings["ours"].is_clean
    assert findings["ours/export"].is_clean
    assert manifest_of(tmp_path / "ours" / "export")["verification"]["passed"] is True
    assert "not verified with a picture" not in said["ours"]


def test_nothing_stays_patched_and_a_trainers_own_callback_is_not_doubled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Trainer

    script = tmp_path / "build.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import Trainer, TrainingArguments\n"
        "from grpo_toolkit import KVCacheCallback\n"
        "args = TrainingArguments(output_dir=sys.argv[1], report_to='none', use_cpu=True)\n"
        "trainer = Trainer(torch.nn.Linear(1, 1), args, callbacks=[KVCacheCallback()])\n"
        "raise SystemExit(7)\n"
    )
    before = Trainer.__init__, list(sys.argv), list(sys.path)
    with pytest.raises(SystemExit) as exited:
        run.main(["--callback", "KVCacheCallback", "--callback", "ResumeGuardCallback", str(script), str(tmp_path)])
    assert exited.value.code == 7  # the script's own
    assert (Trainer.__init__, list(sys.argv), list(sys.path)) == before
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == run.__name__]
    assert "added to Trainer: ResumeGuardCallback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/script.py"], "neither a file here nor a module"),
        (["--callback", "NoCallback", "json"], "callback 'NoCallback': not one of ExportCallback"),
        (["--callbacks", "no/such.yaml", "json"], "cannot be read"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
