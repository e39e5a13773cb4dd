"""One rank of a training on several processes: `ranks.py KIND SCENARIO FOLDER`, started by two_processes.py.

It trains for real and leaves `rank<N>.json` in the folder: first what it runs on, then what the scenario returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Scenario = Callable[..., tuple[dict[str, Any], Any]]


def main(scenarios: dict[str, Scenario]) -> None:
    """Run the scenario that the command names and write its report."""
    kind, scenario, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if kind.startswith("fsdp2"):
        make_fsdp_real_on_a_cpu()
    options = json.loads((folder / "options.json").read_text())
    report, trainer = scenarios[scenario](folder, **options)
    report = {"runs_on": what_this_runs_on(trainer)} | report
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))


def make_fsdp_real_on_a_cpu() -> None:
    """Set FSDP's type and plugin as accelerate does for processes on GPUs; on CPUs it leaves them DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init


def what_this_runs_on(trainer: Any) -> dict[str, Any]:
    accelerator, parameter = trainer.accelerator, next(trainer.model.parameters())
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    shards = "ds_id" if hasattr(parameter, "ds_id") else type(parameter).__name__
    return {
        "distributed_type": accelerator.distributed_type.name,
        "world_size": accelerator.num_processes,
        "rank": accelerator.process_index,
        "shards": "none" if shards == "Parameter" else shards,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "device": accelerator.device.type,
    }


def train(folder: Path, callbacks: list[Any], *, model: str, lora: bool = False, **options: Any) -> Any:
    from peft import LoraConfig

    from scripts.models.tiny_training import LANGUAGE_QV, grpo_trainer

    resume_from = options.pop("resume_from", None)
    config = LoraConfig(r=4, target_modules=LANGUAGE_QV) if lora else None
    # Adam with its usual epsilon makes a whole step of a gradient's rounding error; kinds could not be compared.
    options = {"adam_epsilon": 1e-2, "save_strategy": "steps", "save_steps": 2} | options
    trainer = grpo_trainer(Path(model), folder, callbacks, peft_config=config, **options)
    make_rollouts_equal(trainer)
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def make_rollouts_equal(trainer: Any) -> None:
    """Roll out as ever, but train on completions that follow from the prompt and the place in its group.

    What is sampled hangs on how many processes there are; weights of one and of two could not be compared.
    """
    import random

    original, processing = trainer._generate_single_turn, trainer.processing_class
    special = set(getattr(processing, "tokenizer", processing).all_special_ids)

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        _, logprobs = original(prompt_ids, *args, **kwargs)
        places: dict[str, int] = {}
        found = []
        for ids in map(list, prompt_ids):
            places[str(ids)] = places.get(str(ids), -1) + 1
            chosen = random.Random(f"{ids} {places[str(ids)]}")
            words = [token for token in ids if token not in special]
            found.append(chosen.choices(words, k=trainer.max_completion_length))
        return found, logprobs

    trainer._generate_single_turn = generate


def all_callbacks(folder: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train, save and export with every callback, then save by hand."""
    from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback, ResumeGuardCallback

    strict, arms = options.pop("strict", True), options.pop("arms", ["checkpoint", "export"])
    export = ExportCallback(folder / "export", num_prompts=2, strict=strict)
    latency = LatencyCallback(arms=arms, rounds=1, new_tokens=4, max_new_tokens=None, strict=strict)
    callbacks = [KVCacheCallback(strict=True), ResumeGuardCallback(), export, latency]
    trainer = train(folder / "out", callbacks, **options)
    trainer.save_model(str(folder / "saved"))
    return {
        "step": trainer.state.global_step,
        "exported": export.result is not None,
        "checks": {check.name: check.detail for check in export.result.verification.checks} if export.result else {},
        "failures": [*export.failures, *latency.failures],
        "arms": {row.arm: row.proof.is_cached for row in latency.rows},
    }, trainer


if __name__ == "__main__":
    main({"all_callbacks": all_callbacks})
