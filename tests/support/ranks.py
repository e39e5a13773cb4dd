"""What one rank of a distributed test does: `ranks.py KIND SCENARIO FOLDER`, started by launch.py.

It trains for real and leaves `rank<N>.json` in the folder: first what it runs on, then what the scenario returned.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    kind, scenario, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if kind.startswith("fsdp2"):
        make_fsdp_real_on_a_cpu()
    options = json.loads((folder / "options.json").read_text())
    report, trainer = SCENARIOS[scenario](folder, **options)
    report = {"runs_on": what_this_runs_on(trainer)} | report
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))


def make_fsdp_real_on_a_cpu() -> None:
    """accelerate promotes processes on GPUs alone from DDP to FSDP; set the type and the plugin as it does there."""
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

    from tests.support.training import LANGUAGE_QV, grpo_trainer

    resume_from = options.pop("resume_from", None)
    config = LoraConfig(r=4, target_modules=LANGUAGE_QV) if lora else None
    # Adam with its usual epsilon makes a whole step of a gradient's rounding error; kinds could not be compared.
    options = {"adam_epsilon": 1e-2, "save_strategy": "steps", "save_steps": 2} | options
    trainer = grpo_trainer(Path(model), folder, callbacks, peft_config=config, **options)
    make_rollouts_equal(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def make_rollouts_equal(trainer: Any) -> None:
    """Roll out as ever, but train on completions that follow from the prompt and the place in its group.

    What is sampled hangs on how many processes there are; weights of one and of two could not be compared.
    """
    import random

    original, special = trainer._generate_single_turn, set(trainer.processing_class.tokenizer.all_special_ids)

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


def plain(folder: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train and save without us."""
    trainer = train(folder / "out", [], **options)
    trainer.save_model(str(folder / "saved"))
    return {}, trainer


def resumes(folder: Path, *, model: str, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train four steps, then the last two again from checkpoint-2: from the base and from the checkpoint as model."""
    from grpo_toolkit import KVCacheCallback, ResumeGuardCallback

    report: dict[str, Any] = {}
    checkpoint = folder / "straight" / "checkpoint-2"
    again = {"max_steps": 4, "resume_from": str(checkpoint), **options}
    trainer = train(folder / "straight", [KVCacheCallback(strict=True)], model=model, max_steps=4, **options)
    report["straight"] = digest(trainer)
    trainer = train(folder / "plain", [], model=model, **again)
    report["plain"] = digest(trainer)
    for name, source in (("base", model), ("checkpoint", str(checkpoint))):
        if (Path(source) / "model.safetensors").is_file():  # sharded checkpoints are no models
            guard = ResumeGuardCallback(checkpoint=checkpoint)
            trainer = train(folder / name, [KVCacheCallback(strict=True), guard], model=source, **again)
            report[name] = digest(trainer)
            report[f"{name}_restored"] = len(guard.report.restored) if guard.report else None
    return report, trainer


def digest(trainer: Any) -> str | None:
    """What the weights are, told by rank 0 for all."""
    from grpo_toolkit.model.save_hook import saved_state
    from grpo_toolkit.model.sharding.gather import gather
    from grpo_toolkit.model.sharding.ranks import rank

    state = gather(saved_state(trainer.model))
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest() if rank() == 0 else None


def one_rank_fails(folder: Path, *, failing_rank: int, **options: Any) -> tuple[dict[str, Any], Any]:
    """One rank cannot read its prompts: none may publish, and none may wait for it."""
    import os

    import grpo_toolkit.callbacks.export as module

    if os.environ["RANK"] == str(failing_rank):

        def no_prompts(*args: object, **kwargs: object) -> None:
            raise OSError(5, "Input/output error")

        module.find_requests = no_prompts
    return all_callbacks(folder, strict=False, **options)


def asked_midway(
    folder: Path, *, asks: bool, has_room: bool = True, failing_ranks: Sequence[int] = (), **options: Any
) -> tuple[dict[str, Any], Any]:
    """Train two steps, after the first of which the policy is asked for few tokens, few again, and many.

    On `failing_ranks` a layer's forward raises while it is asked.
    """
    import torch
    from transformers import TrainerCallback

    from grpo_toolkit import KVCacheCallback
    from grpo_toolkit.export.policy_answers import policy_records
    from grpo_toolkit.model.generation.request import Request
    from grpo_toolkit.model.sharding import gathered_for_generation

    if not has_room:
        gathered_for_generation.free_bytes = lambda device: 0
    answers: list[list[int]] = []
    gathers: list[int] = []
    errors: list[str] = []

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not asks or state.global_step != 1:
                return
            model = kwargs["model"]
            for parameter in model.parameters():
                parameter.ds_persist = False  # DeepSpeed keeps small parameters whole, which these all are
            if args.process_index in failing_ranks:
                failing = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
                handle = failing.register_forward_hook(fail)
            for count in (2, 2, 6):
                messages = [{"role": "user", "content": "Count from one to ten."}]
                request = Request(messages=messages, max_new_tokens=count, exact=True)
                try:
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                        records = policy_records(model, kwargs["processing_class"], [request])
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    continue
                answers.append(records[0].tokens)
                named = [event.count for event in profile.key_averages() if "allgather" in event.key.replace("_", "")]
                gathers.append(sum(named))
            if args.process_index in failing_ranks:
                handle.remove()

    trainer = train(folder / "out", [KVCacheCallback(strict=True), Asks()], save_strategy="no", **options)
    return {"answers": answers, "gathers": gathers, "errors": errors, "digest": digest(trainer)}, trainer


SCENARIOS = {
    "all_callbacks": all_callbacks,
    "plain": plain,
    "resumes": resumes,
    "one_rank_fails": one_rank_fails,
    "asked_midway": asked_midway,
}

if __name__ == "__main__":
    main()
