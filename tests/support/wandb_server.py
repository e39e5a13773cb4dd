"""A small W&B server on this machine: enough of its protocol for a run, its history, its files and its artifacts.

It keeps what it was sent, and can be told to fail: `behave("500")`, `"403"`, `"nothing"` (accepts and never answers),
`"half"` (a response cut off in the middle), `"late"` (answers after `delay_s`), `"dead"` (refuses connections).
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

API_KEY = "0" * 40
ENTITY = "someone"


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class WandbServer:
    """The state of the server: runs with their history, summary, config; uploaded files; artifacts with manifests."""

    def __init__(self) -> None:
        self.mode = "well"
        self.delay_s = 3.0
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.calls: Counter[str] = Counter()
        self.queries: list[str] = []
        self._lock = threading.Lock()
        self._start(0)

    def _start(self, port: int) -> None:
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _QuietServer(("127.0.0.1", port), handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, mode: str) -> None:
        """Set the behaviour from now on; `"well"` again brings a dead one back under the same address."""
        was, self.mode = self.mode, mode
        if mode == "dead" and was != "dead":
            self.stop()
        elif was == "dead" and mode != "dead":
            self._start(self.port)

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Return what a user of this server has set."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "HOME": home, "WANDB_MODE": "online"}

    def run(self, name: str) -> dict[str, Any]:
        with self._lock:
            fresh = {"history": {}, "summary": {}, "config": {}, "files": set(), "display": name, "done": False}
            return self.runs.setdefault(name, fresh)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the history of a run, in order, each line once."""
        return [line for _, line in sorted(self.run(name)["history"].items())]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL operation."""
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", "unnamed"])[1]
        self.calls[name] += 1
        self.queries.append(query)
        answer = getattr(self, f"_on_{snake_case(name)}", None)
        if answer is not None:
            return {"data": answer(variables)}
        if "createArtifact(" in query:
            return {"data": self._on_create_artifact(variables)}
        return {"data": {}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.run(name)
        project = {"id": "p", "name": run.get("project", "huggingface"), "entity": {"id": "e", "name": ENTITY}}
        return {"id": f"id-{name}", "name": name, "displayName": run["display"], "config": "{}", "project": project,
                "sweepName": None, "historyLineCount": len(run["history"])}  # fmt: skip

    def _on_viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "v", "entity": ENTITY, "username": ENTITY, "email": "", "admin": False, "flags": "{}",
                  "teams": {"edges": []}, "apiKeys": {"edges": []}, "__typename": "User"}  # fmt: skip
        return {"viewer": viewer}

    def _on_artifact_type(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _on_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        found = [view for name, view in self.views.items() if name == variables["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def _on_upsert_view2(self, variables: dict[str, Any]) -> dict[str, Any]:
        is_new = variables["name"] not in self.views
        view = {"id": f"view-{variables['name']}", "displayName": variables["displayName"], "spec": variables["spec"]}
        self.views[variables["name"]] = view
        return {"upsertView": {"view": {"id": view["id"], "name": variables["name"]}, "inserted": is_new}}

    def _on_upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables["id"].removeprefix("id-")
        with self._lock:
            is_new = name not in self.runs
        run = self.run(name)
        run["display"] = variables.get("displayName") or run["display"]
        run["project"] = variables.get("project") or variables.get("modelName") or run.get("project", "huggingface")
        run["config"] |= json.loads(variables.get("config") or "{}")
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": is_new}}

    def _on_run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        with self._lock:
            known = name in self.runs
        if not known:
            return {"model": {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": ENTITY},
                              "bucket": None}}  # fmt: skip
        run = self.run(name)
        lines = self.rows(name)
        bucket = self._bucket(name) | {
            "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]), "eventsLineCount": 0,
            "logLineCount": 0, "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "eventsTail": "[]", "tags": [], "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": "p", "name": run.get("project"), "entity": {"id": "e", "name": ENTITY},
                          "bucket": bucket}}  # fmt: skip

    def _on_create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["run"]
        files = [{"name": file, "uploadUrl": f"{self.url}/upload/{name}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{name}", "uploadHeaders": [], "files": files}}

    def _on_create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input") or variables
        identity = f"artifact-{len(self.artifacts)}"
        self.artifacts.append({"id": identity, **given})
        artifact = {"id": identity, "state": "PENDING", "digest": given.get("digest"), "versionIndex": 0,
                    "artifactSequence": {"id": "s", "latestArtifact": None}}  # fmt: skip
        return {"createArtifact": {"artifact": artifact}}

    def _on_create_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input") or variables
        identity = given.get("artifactID")
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json",
                "uploadUrl": f"{self.url}/upload/artifacts/{identity}/manifest.json", "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _on_update_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._on_create_artifact_manifest({"artifactID": "again"}) | {
            "updateArtifactManifest": {"artifactManifest": {"id": "m", "file": {
                "id": "f", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json",
                "uploadUrl": f"{self.url}/upload/artifacts/again/manifest.json", "uploadHeaders": []}}}
        }  # fmt: skip

    def _on_create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = (variables.get("input") or variables).get("artifactFiles") or []
        edges = [
            {"node": {"id": str(index), "name": one["name"], "displayName": one["name"],
                      "uploadUrl": f"{self.url}/upload/artifacts/{one['artifactID']}/{one['name']}",
                      "uploadHeaders": [], "storagePath": one["name"], "uploadMultipartUrls": None,
                      "artifact": {"id": one["artifactID"]}}}
            for index, one in enumerate(given)
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input") or variables
        return {"commitArtifact": {"artifact": {"id": given.get("artifactID"), "digest": ""}}}

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take one message of the file stream."""
        run = self.run(name)
        for file, chunk in (body.get("files") or {}).items():
            start = chunk.get("offset", 0)
            lines = [json.loads(line) for line in chunk.get("content") or [] if line and line[0] in "{["]
            with self._lock:
                if file == "wandb-history.jsonl":
                    run["history"] |= {start + index: line for index, line in enumerate(lines)}
                elif file == "wandb-summary.json" and lines:
                    run["summary"] = lines[-1]
        run["files"] |= set(body.get("uploaded") or [])
        run["done"] = run["done"] or bool(body.get("complete"))
        return {"exitcode": None, "limits": {}}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self.do_POST()

    def _handle(self, body: bytes) -> None:
        state = self.server_state
        if state.mode == "nothing":
            time.sleep(120)
        elif state.mode in ("500", "403"):
            self._send(int(state.mode), {"errors": [{"message": f"the server says {state.mode}"}]})
            return
        elif state.mode == "late":
            time.sleep(state.delay_s)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.startswith("/behave/"):
            self._send(200, answer)
            threading.Thread(target=state.behave, args=(self.path.removeprefix("/behave/"),)).start()
            return
        if self.path.startswith("/upload/"):
            with state._lock:
                state.uploads[self.path.removeprefix("/upload/")] = body
        elif "/file_stream" in self.path:
            state.calls["file_stream"] += 1
            answer = state.stream(self.path.split("/")[-2], json.loads(body or b"{}"))
        elif self.path.startswith("/graphql"):
            sent = json.loads(body or b"{}")
            answer = state.answer(sent.get("query", ""), sent.get("variables") or {})
        self._send(200, answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.server_state.mode == "half":
            self.wfile.write(text[: len(text) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(text)


def media(server: WandbServer, run: str) -> dict[str, bytes]:
    """Return the files that were uploaded for a run, by name."""
    prefix = f"{run}/"
    return {name.removeprefix(prefix): body for name, body in server.uploads.items() if name.startswith(prefix)}


@contextmanager
def running() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        if server.mode != "dead":
            server.stop()
