"""Before W&B starts: where its files go, how long it may take, and whether there is anyone to talk to.

What was learnt by trying (wandb 0.31): `init` waits 90 s for a server that says nothing and then raises into the
trainer, so the server is asked first; settings are ignored once its service runs, so all of them are environment
variables set before; a table made offline is kept outside the run's folder unless `allow_offline_artifacts` is off.
"""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

PROBE_S: Final = 2.0
_CLOUD: Final = "https://api.wandb.ai"
_TIMEOUTS: Final = {"WANDB_HTTP_TIMEOUT": "5", "WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "30"}


def prepare_environment(output_dir: str | os.PathLike[str]) -> str | None:
    """Set what is not set: files inside `output_dir`, short timeouts, offline where there is no key or no answer.

    A variable that is set already wins. Does nothing about the mode when a run is open.

    Returns:
        Why the run will be offline although there is a key, or None.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
    os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
    for name, value in _TIMEOUTS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("WANDB_MODE") or is_run_open():
        return None
    key = api_key()
    problem = None if key is None else server_problem(key)
    if key is None or problem is not None:
        os.environ["WANDB_MODE"] = "offline"
    return problem


def is_run_open() -> bool:
    """Whether this process has an open run; never imports W&B."""
    module = sys.modules.get("wandb")
    return module is not None and getattr(module, "run", None) is not None


def base_url() -> str:
    """The server that W&B will talk to."""
    return (os.environ.get("WANDB_BASE_URL") or _CLOUD).rstrip("/")


def api_key() -> str | None:
    """The user's key: from the environment, or from `.netrc` for this server."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(base_url()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return None if found is None else found[2]


def server_problem(key: str, *, limit_s: float = PROBE_S) -> str | None:
    """Ask the server who we are; what is wrong with it, or None if it answers in time."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(_ask(key, limit_s)), daemon=True)
    thread.start()
    thread.join(limit_s)  # a server that sends a byte now and then keeps within every timeout of a socket
    return answers[0] if answers else f"no answer within {limit_s:g} s"


def _ask(key: str, limit_s: float) -> str | None:
    question = json.dumps({"query": "query Viewer { viewer { id entity } }"}).encode()
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {login}"}
    request = urllib.request.Request(f"{base_url()}/graphql", data=question, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            said: Any = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return f"it says {error.code}" if error.code in (401, 403) or error.code >= 500 else None
    except TimeoutError:
        return f"no answer within {limit_s:g} s"
    except urllib.error.URLError as error:
        # A certificate that Python cannot check may be fine for W&B, which brings its own list: let W&B try.
        return None if isinstance(error.reason, ssl.SSLError) else f"it cannot be reached ({error.reason})"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"its answer is cut off ({type(error).__name__})"
    return None if isinstance(said, dict) and (said.get("data") or {}).get("viewer") else "it does not know this key"
