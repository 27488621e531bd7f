"""A server that answers W&B's client as far as `grpo workspace` asks: who is logged in, the runs of a project, a view to keep."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

KEY = "0123456789" * 4


class FakeWandb:
    """Projects of the account `me`: name -> what each run has logged last, the newest run first."""

    def __init__(self, projects: dict[str, list[dict[str, Any]]]) -> None:
        self.projects = projects
        self.entity: str | None = "me"
        self.views: list[dict[str, Any]] = []
        self.refuses = False

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                text = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                answer = self.answer(json.loads(text)) if handler.path == "/graphql" else {}
                body = json.dumps(answer).encode()
                handler.send_response(200)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *_: object) -> None:
                """Nothing is printed."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        if "upsertView" in query:
            if self.refuses:
                return {"errors": [{"message": "permission denied"}], "data": {"upsertView": None}}
            self.views.append(variables)
            return {"data": {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}}
        if "runs(" in query:
            known = variables["entity"] == "me" and variables["project"] in self.projects
            return {"data": {"project": self._runs(variables) if known else None}}
        teams = {"edges": []}
        viewer = {"id": "1", "entity": self.entity, "username": "me", "email": "", "flags": "{}", "teams": teams}
        return {"data": {"viewer": viewer}}

    def _runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        assert variables["order"] == "-created_at"
        runs = self.projects[variables["project"]]
        start = int(variables.get("cursor") or 0)
        end = start + variables["perPage"]
        edges = [
            {"node": _node(f"run{i}", logged), "cursor": str(i + 1)} for i, logged in enumerate(runs[start:end], start)
        ]
        page = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        return {
            "internalId": "1",
            "runCount": len(runs),
            "readOnly": False,
            "runs": {"edges": edges, "pageInfo": page},
        }


def _node(name: str, logged: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "name": name,
        "displayName": name,
        "projectId": "1",
        "state": "finished",
        "config": "{}",
        "summaryMetrics": json.dumps(logged),
        "systemMetrics": "{}",
        "historyKeys": None,
        "historyLineCount": 1,
        "sweepName": None,
        "tags": [],
        "group": "",
        "jobType": "",
        "commit": "",
        "description": "",
        "notes": "",
        "readOnly": False,
        "createdAt": "2025-01-01T00:00:00Z",
        "heartbeatAt": "2025-01-01T00:00:00Z",
        "user": {"name": "me", "username": "me"},
    }
