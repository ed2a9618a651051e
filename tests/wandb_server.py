"""As much of a W&B server as uploading and resuming a run ask for, on this machine."""

import gzip
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.local_server import LocalServer, answer_json


class Server(LocalServer):
    """Keeps the rows of history that are sent to it, by run."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        super().__init__(_handler(self))

    @property
    def environment(self) -> dict[str, str]:
        return {
            "WANDB_BASE_URL": self.address,
            "WANDB_API_KEY": "0123456789" * 4,
        }

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """Of GraphQL."""
        project = {"id": "project", "name": given.get("project"), "entity": {"id": "entity", "name": "someone"}}
        if operation == "RunResumeStatus":
            rows = self.history.get(given["name"])
            return {"model": project | {"bucket": self._bucket(given["name"]) if rows else None}}
        if operation == "UpsertBucket":
            name = given.get("name") or given["id"]
            return {"upsertBucket": {"bucket": self._bucket(name) | {"project": project}, "inserted": True}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": []}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        rows = self.history.get(name, [])
        return {
            "id": name, "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}", "notes": "",
            "historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def receive(self, path: str, content: dict[str, Any]) -> None:
        """Of a file stream, `/files/ENTITY/PROJECT/RUN/file_stream`: lines from an offset on."""
        sent = (content.get("files") or {}).get("wandb-history.jsonl")
        if sent:
            rows = self.history.setdefault(path.split("/")[-2], [])
            rows[sent["offset"] :] = [json.loads(line) for line in sent["content"]]


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                content = json.loads(data)
                answer = {"data": server.answer(content.get("operationName") or "", content["variables"] or {})}
            elif self.path.endswith("/file_stream"):
                server.receive(self.path, json.loads(data))
            answer_json(self, 200, answer)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler
