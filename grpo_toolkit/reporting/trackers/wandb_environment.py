"""The environment of W&B, set before it starts: the place of its files, its timeouts, online or offline.

What was learnt by trying (wandb 0.31): `init` waits 90 s for a server that says nothing and then raises into the
trainer, so the server is asked first; settings are ignored once its service runs, so all of them are environment
variables set before; a table made offline is kept outside the run's folder unless `allow_offline_artifacts` is off.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBE_S: Final = 1.5
FLUSH_S: Final = 0.5
"""The time between W&B's writes of the run's file: 15 s by default, which a kill loses."""

_CLOUD: Final = "https://api.wandb.ai"
_INIT_S: Final = 20.0
_LEAST_INIT_S: Final = 0.5
_TIMES_AS_LONG: Final = 10
_DEFAULTS: Final = {
    "WANDB_HTTP_TIMEOUT": "5",
    "WANDB_FINISH_TIMEOUT": "30",
    "WANDB_ALLOW_OFFLINE_ARTIFACTS": "false",
    "WANDB_ERROR_REPORTING": "false",  # W&B's reports about itself: 12 s more at exit where a server says nothing
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": str(FLUSH_S),
}
_ours: dict[str, str] = {}
"""The variables that this module set, which is nobody's wish and may change."""


def prepare_environment(
    output_dir: str | os.PathLike[str], *, patience_s: float | None = None, spare_s: float = 0.0
) -> str | None:
    """Set what is not set: files inside `output_dir`, short timeouts, offline where there is no key or no answer.

    A variable that is set already wins. Does nothing about the mode when a run is open, or where the user set it:
    then a server that does not answer gets the shortest time to open the run.

    Args:
        output_dir: where W&B's files go.
        patience_s: what a server that fails may cost until the run is open, this function included. None where
            someone waits for it: 20 s.
        spare_s: what one that answers here may cost besides; one that is slow gets ten times as long to open the run
            as it took to answer.

    Returns:
        Why the run will be offline, or may not open, although there is a key; or None.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    folders = {"WANDB_DIR": str(folder), "WANDB_DATA_DIR": str(folder / "wandb" / "data")}
    for name, value in {**folders, **_DEFAULTS}.items():
        _default(name, value)
    problem = None
    if os.environ.get("WANDB_MODE") in (None, "", "online") and not is_run_open():
        problem = _find_mode(patience_s, spare_s)
    _tell()
    return problem


def name_run(name: str | None, base: str | None) -> None:
    """Give a run that nobody named a project, a name, a group and tags; what the user set wins.

    Args:
        name: of the run, such as its output folder's; None leaves it to W&B.
        base: the base's name: runs from one base are a group.
    """
    given = {"WANDB_PROJECT": "grpo", "WANDB_NAME": name, "WANDB_RUN_GROUP": base, "WANDB_TAGS": "grpo,grpo-toolkit"}
    for variable, value in given.items():
        if value:
            _default(variable, value)
    _tell()


def _find_mode(patience_s: float | None, spare_s: float) -> str | None:
    key = api_key()
    started = time.monotonic()
    problem = None if key is None else server_problem(key)
    took_s = time.monotonic() - started
    if (key is None or problem is not None) and not os.environ.get("WANDB_MODE"):
        os.environ["WANDB_MODE"] = _ours["WANDB_MODE"] = "offline"
    init_s = _INIT_S
    if patience_s is not None:
        patience_s = max(_LEAST_INIT_S, patience_s - took_s)
        init_s = min(_INIT_S, patience_s if problem else max(patience_s + spare_s, _TIMES_AS_LONG * took_s))
    _default("WANDB_INIT_TIMEOUT", f"{round(init_s, 1):g}")
    return problem


def _default(name: str, value: str) -> None:
    if not is_users(name):
        os.environ[name] = _ours[name] = value


def is_users(name: str) -> bool:
    """Return whether a variable was set by someone else than this module."""
    return name in os.environ and os.environ[name] != _ours.get(name)


def _tell() -> None:
    """Tell a W&B that was set up before, by `wandb.login()`: it does not read the environment again."""
    setup = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    settings: Any = getattr(setup, "settings_if_loaded", None)
    if hasattr(settings, "update_from_env_vars"):
        settings.update_from_env_vars(_ours)


@contextmanager
def offline() -> Iterator[None]:
    """Make what is opened inside offline, whatever the environment says; that stays as it is."""
    import wandb

    before = wandb.setup().settings.mode
    wandb.setup(wandb.Settings(mode="offline"))
    try:
        yield
    finally:
        wandb.setup(wandb.Settings(mode=before))


def is_run_open() -> bool:
    """Return whether this process has an open run; never imports W&B."""
    module = sys.modules.get("wandb")
    return module is not None and getattr(module, "run", None) is not None


def base_url() -> str:
    """Return the address of the server that W&B will talk to."""
    return (os.environ.get("WANDB_BASE_URL") or _CLOUD).rstrip("/")


def api_key() -> str | None:
    """Return the user's key: from the environment, or from `.netrc` for this server."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    from requests.utils import get_netrc_auth  # W&B needs requests, and reads the file by it too

    found = get_netrc_auth(base_url())
    return None if found is None else found[1]


def server_problem(key: str, *, limit_s: float = PROBE_S) -> str | None:
    """Ask the server who we are; returns what is wrong with it, or None if it answers in time."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(ask(key, limit_s)), daemon=True)
    thread.start()
    thread.join(limit_s)  # a server that sends a byte now and then keeps within every timeout of a socket
    return answers[0] if answers else f"no answer within {limit_s:g} s"


def ask(key: str, limit_s: float) -> str | None:
    """Ask the same without a thread, which no process can start at its end; each wait has the limit."""
    import httpx

    question = {"query": "query Viewer { viewer { id entity } }"}
    try:
        answer = httpx.post(f"{base_url()}/graphql", json=question, auth=("api", key), timeout=limit_s)
        said: Any = answer.json() if answer.is_success else None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        return f"WANDB_BASE_URL is {base_url()!r}, which is no address"
    except httpx.TimeoutException:
        return f"no answer within {limit_s:g} s"
    except httpx.ConnectError as error:
        # A certificate that Python cannot check may be fine for W&B, which brings its own list: let W&B try.
        return None if "CERTIFICATE" in str(error) or "SSL" in str(error) else f"it cannot be reached ({error})"
    except (httpx.HTTPError, ValueError) as error:
        return f"its answer is cut off ({type(error).__name__})"
    if not answer.is_success:
        status = answer.status_code
        return f"it says {status}" if status in (401, 403) or status >= 500 else None
    return None if isinstance(said, dict) and (said.get("data") or {}).get("viewer") else "it does not know this key"
