"""Checks before any weights load: model, output folder, settings, packages, vLLM. Nothing is written."""

from __future__ import annotations

import os
import socket
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from grpo_toolkit import CheckpointError, InputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl import GRPOConfig, ModelConfig

    from grpo_vlm.planning.memory import Load, ModelSize

MARKER = "grpo_recipe.json"
"""Written into output_dir by the recipe: a folder that has it is ours to train into again."""

METRICS = ("accuracy", "runtime")
"""The metrics of an evaluation of `AccuracyTrainer`, without `eval_`."""

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
"""The losses that TRL's `GRPOTrainer` computes (1.16); it refuses any other at the first step."""


def check_versions() -> None:
    """Refuse older stacks, which the package supports: this recipe needs a TRL that never samples image tokens.

    TRL 1.0 may put an image placeholder into a completion, which then matches no image features and stops training.
    """
    import trl
    from packaging.version import Version

    if Version(trl.__version__) < Version("1.16"):
        raise InputError(f"this recipe needs trl >= 1.16, found {trl.__version__}: pip install -U 'trl>=1.16'")


def check_model(name: str | None) -> None:
    """Refuse a local folder that is no whole model; a Hub name is left to the Hub."""
    if not name:
        raise InputError("no model: pass --model_name_or_path with a Hub name or a folder (or `tiny`)")
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise CheckpointError(f"model {name}: no such folder")
        from transformers import AutoConfig

        try:  # a few kilobytes, and the name is known to be right before anything large is fetched
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"model {name}: neither a folder nor to be had from the Hub ({reason})") from error
        return
    if not folder.is_dir() or not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = "; it is an adapter: merge it first (grpo-toolkit export)" if is_adapter else ""
        raise CheckpointError(f"model {name}: no config.json there, so it is no model folder{hint}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(f"model {name}: config.json but no weights (*.safetensors)")


def check_output(output_dir: str | None) -> None:
    """Refuse an output folder that is not new, empty, or one that this recipe made."""
    if not output_dir:
        raise InputError("no output folder: pass --output_dir")
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output_dir {folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputExistsError(
            f"output_dir {folder}: exists and was not made by this recipe (no {MARKER} in it); "
            "choose another with --output_dir, or move it away"
        )
    existing = folder if folder.is_dir() else next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir {folder}: {existing} is a file, so no folder can be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder}: no permission to write in {existing}; choose another folder")


def setting_errors(training: GRPOConfig, *, rewards: Sequence[str]) -> list[str]:
    """Return settings that the trainer refuses, but only once the weights are loaded, or at its first evaluation."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    errors = []
    weights = training.reward_weights
    if weights is not None and len(weights) != len(rewards):
        errors.append(
            f"--reward_weights: {len(weights)} for {len(rewards)} rewards ({', '.join(rewards)}); give one for each"
        )
    metric = training.metric_for_best_model
    if training.eval_strategy != "no" and metric is not None and metric.removeprefix("eval_") not in METRICS:
        errors.append(
            f"--metric_for_best_model {metric}: an evaluation measures {' and '.join(f'eval_{m}' for m in METRICS)}; "
            "set --metric_for_best_model eval_accuracy"
        )
    if training.loss_type not in LOSS_TYPES:
        errors.append(f"--loss_type {training.loss_type}: there are {', '.join(LOSS_TYPES)}")
    errors += [
        f"--report_to {name}: there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, and none"
        for name in training.report_to
        if name not in INTEGRATION_TO_CALLBACK
    ]
    return errors


def missing_packages(training: GRPOConfig, model: ModelConfig, *, formulas: bool) -> list[str]:
    """Return the packages that the settings need, and `formulas` among the answers, and that are not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from transformers.utils import is_bitsandbytes_available

    missing = []
    optimizer = str(getattr(training.optim, "value", training.optim))
    wanting = [f"--optim {optimizer}"] if needs_bitsandbytes(optimizer) else []
    wanting += [f"--{name}" for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)]
    if wanting and not is_bitsandbytes_available():
        missing.append(f"{' and '.join(wanting)}: bitsandbytes is not installed here: pip install -U bitsandbytes")
    # Two that transformers never lists: Flyte, and Azure ML beside MLflow.
    found = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    missing += [
        f"--report_to {name}: not installed here; install it, or --report_to none"
        for name in training.report_to
        if name in INTEGRATION_TO_CALLBACK and name not in found
    ]
    if formulas and find_spec("math_verify") is None:
        missing.append("answers that are formulas: math-verify is not installed here: pip install math-verify")
    return missing


def needs_bitsandbytes(optimizer: str) -> bool:
    """Return whether transformers takes this `optim` from bitsandbytes; torchao and GaLore have eight bits, too."""
    return optimizer == "adamw_8bit" or any(part in optimizer for part in ("bnb", "paged", "lion", "ademamix"))


def check_vllm(training: GRPOConfig) -> None:
    """Refuse rollouts by vLLM that this machine cannot have.

    Raises:
        InputError: what is in the way, and what to do.
    """
    problem = vllm_problem(training)
    if problem is not None:
        raise InputError(problem)


def vllm_problem(training: GRPOConfig) -> str | None:
    """Return what is certain to keep vLLM from answering, or None: TRL would find out after the weights are loaded."""
    from trl.import_utils import is_vllm_available

    if not training.use_vllm:
        return None
    if training.device.type == "cpu":
        why = "drops the weights that it has packed, and no training can reload them"
        if training.vllm_mode == "server":
            why = "has no way to get the weights of a training without one (TRL sends them by NCCL)"
        return f"--use_vllm needs a GPU for the training: on a CPU vLLM {why}; leave it out, --use_vllm false"
    if not is_vllm_available():
        return "--use_vllm: vLLM is not installed here: pip install 'trl[vllm]', or --use_vllm false"
    return _server_problem(training)


def vllm_bytes(size: ModelSize, load: Load, *, processes: int = 1) -> float:
    """Return the least that vLLM needs of each GPU that it spreads over: its weights, and the cache of one answer.

    It holds them in two bytes, whatever the training has; its graphs and activations come on top.
    """
    cached = size.rollouts.kv_values_per_token * (load.prompt_tokens + load.completion_tokens)
    return 2.0 * (size.parameters + cached) / processes


def server_warning(training: GRPOConfig) -> str | None:
    """Return a warning where nobody listens yet at vLLM's address, or None. It may be starting: TRL waits for it."""
    if not training.use_vllm or training.vllm_mode != "server" or training.process_index != 0:
        return None
    host, port = server_address(training)
    try:
        with socket.create_connection((host, port), timeout=3):
            return None
    except OSError as error:
        return (
            f"no vLLM server at {host}:{port} ({error.strerror or error}): start it "
            f"(bash recipes/launch/vllm_server.sh) or name its place with --vllm_server_host and --vllm_server_port; "
            f"the run waits {training.vllm_server_timeout:.0f} s for it, and then ends"
        )


def server_address(training: GRPOConfig) -> tuple[str, int]:
    """Return host and port of vLLM's server.

    Raises:
        InputError: the URL that was given has none.
    """
    if training.vllm_server_base_url is None:
        return training.vllm_server_host, training.vllm_server_port
    url = urlsplit(training.vllm_server_base_url)
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
    except (KeyError, ValueError):
        port = 0
    if not url.hostname or not port:
        raise InputError(f"--vllm_server_base_url {training.vllm_server_base_url}: expected http://HOST:PORT")
    return url.hostname, port


def _server_problem(training: GRPOConfig) -> str | None:
    """Return a host that nobody knows, or another program at its address, which TRL would ask for ever."""
    if training.vllm_mode != "server" or training.process_index != 0:
        return None
    host, port = server_address(training)
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        return f"vLLM's server: no host {host!r} ({error.strerror or error}); name it with --vllm_server_host"
    url = f"{training.vllm_server_base_url or f'http://{host}:{port}'}/health"
    try:
        with urlopen(url, timeout=3):
            return None
    except HTTPError as error:
        if error.code >= 500:  # a gateway before a server that is starting
            return None
        found = f"status {error.code}"
    except HTTPException as error:
        found = type(error).__name__
    except OSError:
        return None  # nobody there yet
    return f"{url}: {found}, so what answers there is no vLLM server; name its place with --vllm_server_port"
