"""As much of the hub as an upload needs, on this machine: repositories, commits and tags, kept in memory."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What was pushed: `files` of each repository by name, `tags` with the files that each stands for, requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.broken = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.broken:
            self._answer(500, {"error": "Out of order"})
        elif self.headers.get("authorization") != "Bearer hf_secret":
            self._answer(401, {"error": "Invalid user token."})
        elif self.path == "/api/validate-yaml":  # of a card's front matter
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            kind, repo, verb = re.fullmatch(r"/api/(\w+)s/([\w.-]+/[\w.-]+)/(\w+)/.*", self.path).groups()
            getattr(self, f"_{verb}")(kind, repo, body)

    def do_GET(self) -> None:
        self._answer(200, {"id": "user/name", "sha": "0" * 40, "siblings": []})

    def do_DELETE(self) -> None:
        self._answer(404, {"error": "no such tag"})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization')}/{asked['name']}" if asked.get("organization") else asked["name"]
        is_new = repo not in self.server.files
        self.server.files.setdefault(repo, {})
        if is_new:
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        prefix = "datasets/" if asked.get("type") == "dataset" else ""
        self._answer(200 if is_new else 409, {"url": f"{self.server.address}/{prefix}{repo}", "name": repo})

    def _preupload(self, kind: str, repo: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        self._answer(200, {"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})

    def _commit(self, kind: str, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.server.files[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        oid = f"{len(self.server.tags.get(repo, {})):040d}"
        self._answer(200, {"commitUrl": f"{self.server.address}/{repo}/commit/{oid}", "commitOid": oid})

    def _tag(self, kind: str, repo: str, body: bytes) -> None:
        self.server.tags.setdefault(repo, {})[json.loads(body)["tag"]] = dict(self.server.files[repo])
        self._answer(200, {})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""
