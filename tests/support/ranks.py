"""One rank of a distributed test: scripts/benchmarks/ranks.py, with the scenarios that only tests run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.ranks import all_callbacks, main, train

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    """Return a sum of all weights on rank 0."""
    from grpo_toolkit.model.saving.save_hook import saved_state
    from grpo_toolkit.model.sharding.gather import gather
    from grpo_toolkit.model.sharding.ranks import rank

    state = gather(saved_state(trainer.model))
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest() if rank() == 0 else None


def one_rank_fails(folder: Path, *, failing_rank: int, **options: Any) -> tuple[dict[str, Any], Any]:
    """Let one rank fail to read its prompts: none may publish, and none may wait for it."""
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
    """Train two steps; after the first the model is asked for few tokens, few again, and many.

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


def fast_rollouts(
    folder: Path,
    *,
    way: str,
    failing_ranks: Sequence[int] = (),
    fails_at: str = "generate",
    as_recipe: bool = False,
    trial: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """Train with rollouts of one way; after each step the copy's logits are compared with the live model's.

    On `failing_ranks` the copy's second rollout raises, or the first one's "prefill", or what comes before: "install",
    and "_empty" after 20 tensors of the copy; `as_recipe` adds the recipe's callback for plain rollouts; `trial` has a
    clock decide.
    """
    import os

    import torch
    from transformers import TrainerCallback

    from grpo_toolkit import FastRolloutCallback, KVCacheCallback
    from grpo_toolkit.model.rollouts import rollouts
    from grpo_toolkit.model.rollouts.rollouts import rollouts_of
    from grpo_toolkit.model.rollouts.weights_copy import WeightsCopy
    from grpo_toolkit.model.sharding.gathered_for_generation import whole_weights

    seen: list[tuple[int, float]] = []
    made: list[object] = []
    empty = WeightsCopy._empty

    def no_room(self: Any, *args: Any) -> Any:
        made.append(args)
        return fail() if len(made) > 20 else empty(self, *args)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    class Compare(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for parameter in kwargs["model"].parameters():
                parameter.ds_persist = False  # DeepSpeed keeps small parameters whole, which these all are

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken: Any = rollouts_of(kwargs["model"])
            if taken is None or taken._copy is None:
                return
            ids = torch.tensor([[40, 41, 42, 43]])
            taken._copy.refresh()
            with torch.no_grad(), whole_weights(kwargs["model"]):
                live = kwargs["model"](input_ids=ids).logits
                seen.append((taken.count, float((taken._copy.model(input_ids=ids).logits - live).abs().max())))
            if args.process_index in failing_ranks and fails_at == "generate":
                taken._copy.model.generate = fail

    if int(os.environ["RANK"]) in failing_ranks and fails_at != "generate":
        owner = {"prefill": rollouts, "install": rollouts.FastRollouts, "_empty": WeightsCopy}[fails_at]
        setattr(owner, fails_at, no_room if fails_at == "_empty" else fail)
    callback = FastRolloutCallback(way, trial=trial)
    others = []
    if as_recipe:
        from grpo_vlm.training.sharded_rollouts import ShardedRolloutsCallback

        others = [ShardedRolloutsCallback()]
    callbacks = [KVCacheCallback(), *others, callback, Compare()]
    trainer = train(folder / "out", callbacks, save_strategy="no", **options)
    report = {"seen": seen, "chosen": callback.chosen, "kl": callback.kl, "failures": callback.failures}
    report["grad_norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return report, trainer


def merged_for_vllm(folder: Path, *, guarded: bool, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train an adapter, walking before each step over the weights as TRL does for vLLM; compare the base's."""
    from transformers import TrainerCallback
    from trl.generation.vllm_generation import VLLMGeneration

    from grpo_toolkit.model.merge_guard import guard_merges
    from grpo_toolkit.model.sharding.gather import gather

    found: list[dict[str, Any]] = []
    sent: list[int] = []

    class Sync(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            from accelerate import Accelerator
            from trl.distributed import DistributedBackend

            model = kwargs["model"]
            if guarded:
                guard_merges(model)
            base = {name: weight for name, weight in model.named_parameters() if "base_layer" in name}
            found.append(gather(base))
            generation = object.__new__(VLLMGeneration)  # its __init__ starts vLLM
            generation.model, generation.accelerator = model, Accelerator()
            generation._dist = DistributedBackend(generation.accelerator)
            sent.append(sum(weight.numel() for _, weight in generation._iter_named_params()))

    options = {"max_steps": 3, "learning_rate": 0.1, "adam_epsilon": 1e-8, "save_strategy": "no", **options}
    trainer = train(folder / "out", [Sync()], lora=True, **options)
    changed = [name for name, weight in found[0].items() if not weight.equal(found[-1][name])]
    return {"changed": changed, "sent": sent, "weights": len(found[0])}, trainer


def fast_step(folder: Path, *, fast: bool, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train two steps with rows, images, tower and rollouts made fast, or without; no step is saved."""
    from transformers import TrainerCallback

    from grpo_toolkit import FastRolloutCallback, KVCacheCallback, PackedVisionCallback, rows_once
    from grpo_toolkit.model.rollouts.rollouts import rollouts_of
    from scripts.models import tiny_training

    packing, rollouts = PackedVisionCallback(strict=True), FastRolloutCallback("fast", strict=True)
    seen: list[dict[str, Any]] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken = rollouts_of(kwargs["model"])
            images, tower = packing.images, packing.packing
            assert images is not None
            assert tower is not None
            seen.append(
                {
                    "fast": 0 if taken is None else taken.count,
                    "images": [images.asked, images.processed],
                    "tower": [tower.layers, sum(one.asked for one in tower.images), len(tower.images)],
                }
            )

    if fast:
        plain_rows = tiny_training.rows
        tiny_training.rows = lambda *args, **kwargs: rows_once(plain_rows(*args, **kwargs))
    callbacks = [KVCacheCallback(strict=True), *([packing, rollouts, Counts()] if fast else [])]
    trainer = train(folder / "out", callbacks, save_strategy="no", **options)
    keys = ("loss", "grad_norm", "reward", "sampling/rollout_kl")
    logs = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history if "loss" in row]
    return {"logs": logs, "seen": seen, "chosen": rollouts.chosen, "failures": rollouts.failures}, trainer


def step_times(folder: Path, *, slow_rank: int, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train without and with step times; the reward function of one rank takes two seconds longer in the second."""
    import os
    import time

    from grpo_toolkit import StepTimeCallback
    from scripts.models import tiny_training

    trainer = train(folder / "plain", [], save_strategy="no", **options)
    expected = digest(trainer)
    usual = tiny_training.length_reward

    def slow(completions: list[Any], **kwargs: Any) -> list[float]:
        time.sleep(2.0 if os.environ["RANK"] == str(slow_rank) else 0.0)
        return usual(completions, **kwargs)

    tiny_training.length_reward = slow
    callback = StepTimeCallback(strict=True)
    trainer = train(folder / "out", [callback], save_strategy="no", **options)
    return {
        "is_same": digest(trainer) == expected,
        "sums": [sum(row.phases_s.values()) / row.wall_s for row in callback.rows],
        "phases": sorted({name for row in callback.rows for name in row.phases_s}),
        "slowest": callback.explanation.slowest_rank if callback.explanation else None,
    }, trainer


SCENARIOS = {
    "fast_rollouts": fast_rollouts,
    "merged_for_vllm": merged_for_vllm,
    "all_callbacks": all_callbacks,
    "plain": plain,
    "resumes": resumes,
    "one_rank_fails": one_rank_fails,
    "asked_midway": asked_midway,
    "fast_step": fast_step,
    "step_times": step_times,
}

if __name__ == "__main__":
    main(SCENARIOS)
