"""Trainings with W&B, each in a process of its own, and replays of what they left."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.ports import free_port
from tests.support.warm import python

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.support.wandb_server import WandbServer

SCRIPT = textwrap.dedent(
    """
    import sys, json, os, time, hashlib, signal, urllib.request
    from pathlib import Path
    mode = os.environ.pop("WANDB_MODE", None)
    import tests.conftest  # offline, one thread
    os.environ.pop("WANDB_MODE")
    if mode: os.environ["WANDB_MODE"] = mode
    from tests.support.training import grpo_trainer
    from transformers import TrainerCallback
    from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback

    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    options = json.loads(sys.argv[3])

    def behave(mode):
        urllib.request.urlopen(options["url"] + "/behave/" + mode, b"", timeout=10).read()

    class Disturb(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            if options["wandb_by_hand"]:
                import wandb
                wandb.init(project="huggingface", dir=out.parent, mode="offline")
            if options["on_init"]:
                behave(options["on_init"])
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and options["on_step"]:
                behave(options["on_step"])
            if state.global_step == 2 and options["finish_early"]:
                import wandb
                wandb.finish()
        def on_train_end(self, args, state, control, **kwargs):
            if options["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [KVCacheCallback(strict=True)]
    latency = LatencyCallback(arms=options["arms"], rounds=2, new_tokens=4, strict=True,
                              max_new_tokens=options["natural"], every_steps=options["every_steps"],
                              batch_sizes=(), log_artifact=options["artifact"])
    if "export" in options["arms"]:
        callbacks.append(ExportCallback(out / "export", strict=True))
    if options["arms"]:
        callbacks.append(latency)
    callbacks.append(Disturb())
    trainer = grpo_trainer(base, out, callbacks, report_to=options["report_to"], run_name="t")
    started = time.monotonic()
    trainer.train()
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    problems = {name: breaker.problems for name, breaker in latency.mirror.breakers.items()}
    facts = {"weights": digest.hexdigest(), "train_s": time.monotonic() - started, "ended_at": time.time(),
             "spent_s": latency.mirror.budget.spent_s,
             "problems": problems, "failures": latency.failures}
    if trainer.args.process_index == 0:
        (out / "facts.json").write_text(json.dumps({**facts, "processes": trainer.accelerator.num_processes}))
    """
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    returncode: int
    printed: str
    facts: dict[str, Any]
    seconds: float
    exit_s: float | None


def train(
    base: Path,
    out: Path,
    *,
    server: WandbServer | None = None,
    arms: Sequence[str] = ("base",),
    artifact: bool = False,
    on_init: str = "",
    on_step: str = "",
    variables: Mapping[str, str] | None = None,
    kill: bool = False,
    finish_early: bool = False,
    wandb_by_hand: bool = False,
    report_to: str = "wandb",
    processes: int = 1,
    natural: int | None = None,
    every_steps: int | None = None,
    fresh: bool = False,
    timeout_s: float = 240,
) -> Trained:
    """Train two steps of GRPO; the server does `on_init` once it was asked, and `on_step` from the first step on.

    `fresh` starts from nothing, as a user does; the others have their imports made (warm.py). With Trackio all start
    from nothing: TRL imports it, and it reads where its data lies when it is imported.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"arms": list(arms), "artifact": artifact, "on_init": on_init, "on_step": on_step, "kill": kill,
               "report_to": report_to, "finish_early": finish_early, "wandb_by_hand": wandb_by_hand,
               "natural": natural, "every_steps": every_steps,
               "url": "" if server is None else server.url}  # fmt: skip
    # To files: what is left of a process must not hold a pipe open.
    with Path(f"{out}.stdout").open("w+") as stdout, Path(f"{out}.stderr").open("w+") as stderr:
        started = time.monotonic()
        environ = environment(out.parent, server) | dict(variables or {})
        launcher = _launcher(python(fresh=fresh or report_to == "trackio"), Path(f"{out}.py"), processes)
        done = subprocess.run(
            [*launcher, str(base), str(out), json.dumps(options)], env=environ, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=stderr, timeout=timeout_s, check=False,
        )  # fmt: skip
        seconds, ended_at = time.monotonic() - started, time.time()
        stdout.seek(0)
        stderr.seek(0)
        printed = stdout.read() + stderr.read()
    assert done.returncode == (-9 if kill else 0), printed[-3000:]
    facts = json.loads((out / "facts.json").read_text()) if (out / "facts.json").exists() else {}
    exit_s = ended_at - facts["ended_at"] if facts else None
    return Trained(returncode=done.returncode, printed=printed, facts=facts, seconds=seconds, exit_s=exit_s)


def _launcher(command: list[str], script: Path, processes: int) -> list[str]:
    script.write_text(SCRIPT)
    if processes == 1:
        return [*command, str(script)]
    count = ["--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [*command, "-m", "torch.distributed.run", *count, *command[1:], str(script)]


def environment(home: Path, server: WandbServer | None) -> dict[str, str]:
    """Return the environment of a user with a key for this server, or without any."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    mine |= {"NETRC": str(home / "no-netrc"), "HOME": str(home), "WANDB_SILENT": "true"}
    if server is not None:
        mine |= server.environment(str(home))
        del mine["WANDB_MODE"]
    return mine


def replay(out: Path, server: WandbServer | None, tracker: str = "wandb") -> dict[str, Any]:
    """Run `grpo-toolkit report --replay` in a process of its own."""
    command = [*python(fresh=tracker == "trackio"), "-m", "grpo_toolkit.cli", "report", str(out)]
    command += ["--replay", tracker, "--json"]
    with Path(f"{out}.replay").open("w+") as said, Path(f"{out}.replay-log").open("w+") as log:
        done = subprocess.run(
            command, env=environment(out.parent, server), stdin=subprocess.DEVNULL, stdout=said, stderr=log,
            timeout=120, check=False,
        )  # fmt: skip
        said.seek(0)
        log.seek(0)
        assert done.returncode == 0, log.read()[-3000:]
        found: list[dict[str, Any]] = json.loads(said.read().splitlines()[-1])["replayed"]
    return found[-1]
