"""README's snippet, run as it stands: once, and a second time where the first has left its export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from packaging.version import Version

from grpo_toolkit.callbacks import latency_budget
from grpo_toolkit.checkpoint.manifest import manifest_of
from grpo_toolkit.errors import OutputExistsError
from scripts.models.tiny_training import length_reward, rows

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the tiny model samples image tokens")
def test_the_snippet_trains_once_and_stops_at_once_the_second_time(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOConfig, GRPOTrainer

    [snippet] = re.findall(
        r"## Add to your script\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert '"Qwen/Qwen2.5-VL-3B-Instruct"' in snippet
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency_budget, "SMOKE_BUDGET_S", 0.0)
    built: list[Any] = []

    def trainer_of(**options: Any) -> Any:
        built.append(GRPOTrainer(**{**options, "model": str(qwen)}))
        return built[-1]

    names = {
        "GRPOTrainer": trainer_of,
        "args": GRPOConfig(
            output_dir="run", max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        ),
        "rewards": length_reward,
        "train": rows(2),
    }  # fmt: skip
    exec(snippet, dict(names))
    assert manifest_of(tmp_path / "out" / "export")["verification"]["passed"] is True
    [row, *_] = (tmp_path / "run" / "latency" / "latency.jsonl").read_text().splitlines()
    assert '"arm": "base"' in row
    with pytest.raises(OutputExistsError, match=r"out/export: an export is there already; pass overwrite=True"):
        exec(snippet, dict(names))
    assert len(built) == 1  # the second stopped before a model was loaded
