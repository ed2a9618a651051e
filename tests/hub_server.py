"""As much of the Hugging Face hub as making a repository and uploading a folder ask for, on this machine."""

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.local_server import LocalServer, answer_json

TOKEN = "hf_of_the_test"


class Hub(LocalServer):
    """Keeps what is uploaded, by repository and path."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        """What `create` was asked for."""
        self.refusal: int | None = None
        """A status with which commits are refused."""
        super().__init__(_handler(self))

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return a status and JSON."""
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            if asked.get("organization") == "nobody":
                return 404, {"error": "no such owner"}
            self.made.append(asked)
            return 200, {"url": f"{self.address}/{asked.get('organization', 'someone')}/{asked['name']}"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {
                "files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            }
        if "/commit/" in path:
            if self.refusal:
                return self.refusal, {"error": "refused"}
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            kept = self.files.setdefault(name, {})
            kept |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40, "hookOutput": ""}
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        return 200, {"id": "someone/made", "sha": "0" * 40, "siblings": []}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = hub.answer(self.path, self.headers.get("Authorization", ""), body)
            answer_json(self, status, found)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
