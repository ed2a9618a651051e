"""As much of the Hugging Face hub as making a repository and uploading a folder ask for, on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class Hub:
    """Keeps what is uploaded, by repository and path. A context: it serves until it is left."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        """What `create` was asked for."""
        self.refusal: int | None = None
        """A status with which commits are refused."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

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
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
