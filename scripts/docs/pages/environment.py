"""The environment variables that the package and the recipe read or set, found in their source."""

from __future__ import annotations

import ast
import re
from typing import Final

from scripts.docs.pages.markdown import table
from scripts.docs.pages.source import sources, tree_of

MEANINGS: Final = {
    "ACCELERATE_USE_FSDP": "Set by `accelerate launch`. The recipe reads whether FSDP shards the model.",
    "FSDP_*": "Set by `accelerate launch`. The recipe reads FSDP's settings.",
    "GROUP_RANK": "Set by a launcher. Not passed on to the processes that load an export.",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "The recipe sets it to 1 if it is not set: no progress bars of `datasets`.",
    "HF_HOME": "Where a base named by its Hub name is looked for, under `hub`.",
    "HF_HUB_CACHE": "Where a base named by its Hub name is looked for. Wins over `HF_HOME`.",
    "HF_HUB_DISABLE_PROGRESS_BARS": "Set to 1 if it is not set: no progress bars of the Hub.",
    "HUGGINGFACE_HUB_CACHE": "The older name of `HF_HUB_CACHE`.",
    "LOCAL_RANK": "Set by a launcher: the GPU of this process. The recipe asks that GPU for its free memory.",
    "LOCAL_WORLD_SIZE": "Set by a launcher: how many processes share this machine's memory.",
    "NO_COLOR": "If it is set, the doctor prints no colours.",
    "NODE_RANK": "Set by a launcher. Not passed on to the processes that load an export.",
    "OPENAI_API_KEY": "The key for an endpoint that `bench` asks, if none is given.",
    "PYTHONPATH": "Passed on, with the package's folder in front, to the processes that are started.",
    "PYTHONWARNINGS": "The recipe sets it if it is not set, so that warnings of other libraries stay off the screen.",
    "RANK": "Set by a launcher: messages that every process would print are printed by process 0 only.",
    "TENSORBOARD_LOGGING_DIR": "Where the trainer's TensorBoard files are.",
    "TERM": "If it is `dumb`, the doctor prints no colours.",
    "TRANSFORMERS_VERBOSITY": "The recipe sets it to `error` if it is not set.",
    "WANDB_ALLOW_OFFLINE_ARTIFACTS": "Set to `false` if it is not set: no copies of artifacts for an offline run.",
    "WANDB_API_KEY": "W&B's key. Without one, here and in `~/.netrc`, the run is kept offline.",
    "WANDB_BASE_URL": "W&B's server. It is asked once whether it answers.",
    "WANDB_DATA_DIR": "Set if it is not set, so that W&B's files are in the output folder.",
    "WANDB_DIR": "Set to the output folder if it is not set. Offline runs to replay are looked for there.",
    "WANDB_ERROR_REPORTING": "Set to `false` if it is not set: no reports about W&B itself.",
    "WANDB_FINISH_TIMEOUT": "Set to 30 seconds if it is not set.",
    "WANDB_HTTP_TIMEOUT": "Set to 5 seconds if it is not set.",
    "WANDB_INIT_TIMEOUT": "Set if it is not set: how long a training waits for the run to open.",
    "WANDB_MODE": "`offline` or `disabled` wins. "
    "Set to `offline` if it is not set and no server answers, or no key is known.",
    "WANDB_NAME": "Set to the name of the output folder if neither you nor the script named the run.",
    "WANDB_PROJECT": "Set to `grpo` if it is not set and a callback opens the run. A replay into W&B takes "
    "`huggingface` if nothing else is known.",
    "WANDB_RUN_GROUP": "Set to the name of the base if it is not set, so that runs from one base are a group.",
    "WANDB_SILENT": "The recipe sets it to `true` if it is not set.",
    "WANDB_TAGS": "Set to `grpo,grpo-toolkit` if it is not set.",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "Set if it is not set, so that a killed run loses half a second.",
    "WORLD_SIZE": "Set by a launcher. Not passed on to the processes that load an export.",
    "XDG_CACHE_HOME": "The folder of caches, in place of `~/.cache`.",
}
INTERNAL: Final = frozenset({"GRPO_TOOLKIT_SCRATCH", "TOKENIZERS_PARALLELISM"})
"""Those that the package sets for processes of its own, and nobody else."""
_LOOKS: Final = re.compile(r"[A-Z][A-Z0-9]*(_+[A-Z0-9]+)+|RANK|PYTHON[A-Z]+")
_OTHERS: Final = frozenset({"LOCAL_STATE_DICT", "SCRIPT_OR_MODULE", "SHARDED_STATE_DICT"})
"""Words in the same files that look like a variable and are none."""
INTRODUCTION: Final = """# Environment variables

No variable is needed. A variable that you set always wins over what the package or the recipe would set.
"""


def environment_page() -> str:
    """Return the variables, each with what it does.

    Raises:
        ValueError: the source has others than are described.
    """
    found = variables() - INTERNAL - _OTHERS
    if found != MEANINGS.keys():
        raise ValueError(
            f"environment variables: not described {sorted(found - MEANINGS.keys())}, "
            f"not in the source {sorted(MEANINGS.keys() - found)}"
        )
    rows = ([f"`{name}`", MEANINGS[name]] for name in sorted(found))
    return f"{INTRODUCTION}\n{table(('variable', 'meaning'), rows)}\n"


def variables() -> set[str]:
    """Return what looks like a variable's name in files that use `os.environ`; `*` stands for an end that varies."""
    found: set[str] = set()
    for path in sources("grpo_toolkit", "recipes"):
        if "os.environ" not in path.read_text(encoding="utf-8"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _LOOKS.fullmatch(node.value):
                found.add(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("os.environ."):
                found |= {_asked(argument) for argument in node.args[:1]} - {""}
    return found


def _asked(argument: ast.expr) -> str:
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else None
    return f"{first.value}*" if isinstance(first, ast.Constant) else ""
