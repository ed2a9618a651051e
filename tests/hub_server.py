"""As much of the Hugging Face hub as making a repository, uploading to it and reading it ask for, on this machine.

Files come within the commit, or large ones by Git LFS's batch protocol: as one body, or in parts. A repository has one
commit, and all answers are of its newest state.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.local_server import LocalServer, answer_json

TOKEN = "hf_of_the_test"
COMMIT = "0" * 40
_LARGE = (".safetensors", "/0")
"""Ends of the names of tensors and of shards."""


def reach(patch: pytest.MonkeyPatch, address: str, *, token: str = TOKEN, offline: bool = False) -> None:
    """Have the hub's library, in this process, ask `address`: it takes that from the environment when it is imported.

    Large files come by Git LFS: Xet, the hub's other protocol, is left to its own library.
    """
    from huggingface_hub import constants

    url = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_OFFLINE": offline}
    for name, value in {**values, "HF_HUB_DISABLE_XET": True}.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", token)


class Hub(LocalServer):
    """Keeps what is uploaded, by repository and path."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        """What `create` was asked for."""
        self.refusal: int | None = None
        """A status with which commits are refused, or large files if there are some."""
        self.large: int | None = None
        """Bytes of a part in which large files come, 0 for one body; none: they come within the commit."""
        self.blobs: dict[str, bytes] = {}
        """Large files, and parts of them, by where they were put."""
        self.verified: set[str] = set()
        self.asked: Callable[[str, str], object] = lambda method, path: None
        """Called with the method and path of every request, before it is answered."""
        super().__init__(_handler(self))

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Return a status and JSON."""
        if path.startswith("/large/"):  # addresses that are signed need no token
            return self._large(path.removeprefix("/large/"), json.loads(body))
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            if asked.get("organization") == "nobody":
                return 404, {"error": "no such owner"}
            self.made.append(asked)
            if asked.get("type") == "dataset":
                self.files.setdefault(f"{asked.get('organization', 'someone')}/{asked['name']}", {})
            return 200, {"url": f"{self.address}/{asked.get('organization', 'someone')}/{asked['name']}"}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(one["path"]) for one in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
        if "/commit/" in path:
            if self.refusal and self.large is None:
                return self.refusal, {"error": "refused"}
            name = re.sub("^/api/(models|datasets)/", "", path).split("/commit/")[0]
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            kept = self.files.setdefault(name, {})
            kept |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            for line in lines:
                if line["key"] == "lfsFile":
                    kept[line["value"]["path"]] = self.blobs[line["value"]["oid"]]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40, "hookOutput": ""}
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if found := re.match("/api/datasets/([^/]+/[^/]+)/tree/", path):
            return 200, [_entry(name, data) for name, data in self.files.get(found[1], {}).items()]
        if (found := re.match("/api/datasets/([^/]+/[^/?]+)", path)) and found[1] not in self.files:
            return 404, {"error": "Repository not found"}
        return 200, {"id": "someone/made", "sha": COMMIT, "siblings": []}

    def content(self, path: str, token: str) -> bytes | None:
        """Return a file of a data set by its address, or None."""
        found = re.match(f"/datasets/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)
        return self.files.get(found[1], {}).get(found[2]) if found and token == f"Bearer {TOKEN}" else None

    def put(self, path: str, body: bytes) -> int:
        """Keep a large file or a part of one; returns a status."""
        self.blobs[path.removeprefix("/large/")] = body
        return self.refusal or 200

    def _mode(self, path: str) -> dict[str, Any]:
        large = self.large is not None and path.endswith(_LARGE)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        """Say where to put a large file, unless it is there."""
        oid, size = one["oid"], one["size"]
        if oid in self.blobs:
            return one
        place = f"{self.address}/large/{oid}"
        upload: dict[str, Any] = {"href": place}
        if self.large:
            parts = {f"{number + 1:05d}": f"{place}/{number}" for number in range(-(-size // self.large))}
            upload |= {"href": f"{place}/complete", "header": {"chunk_size": str(self.large)} | parts}
        return one | {"actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}}

    def _large(self, place: str, told: dict[str, Any]) -> tuple[int, Any]:
        """Join the parts of a file, or check that the whole has the digest that it was announced with."""
        oid, what = place.split("/")
        if what == "complete":
            numbers = [part["partNumber"] - 1 for part in told["parts"]]
            self.blobs[oid] = b"".join(self.blobs.pop(f"{oid}/{number}") for number in numbers)
            return 200, {}
        if hashlib.sha256(self.blobs[oid]).hexdigest() != oid or told["size"] != len(self.blobs[oid]):
            return 422, {"error": "another file than was announced"}
        self.verified.add(oid)
        return 200, {}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """Describe a file as a tree lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data), "oid": blob} | (large if path.endswith(_LARGE) else {})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            hub.asked(self.command, self.path)
            if "/resolve/" in self.path:
                return self._send_file()
            status, found = hub.answer(self.path, self.headers.get("Authorization", ""), body)
            answer_json(self, status, found)

        do_GET = do_POST = do_HEAD = _answer

        def _send_file(self) -> None:
            """Send a file, or the end of it that is asked for; its ETag is its checksum, as the hub has it."""
            data = hub.content(self.path, self.headers.get("Authorization", ""))
            if data is None:
                return answer_json(self, 404, {"error": "Entry not found"})
            entry, start = _entry(self.path, data), 0
            if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(asked[1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:])

        def do_PUT(self) -> None:
            hub.asked(self.command, self.path)
            self.send_response(hub.put(self.path, self._body()))
            self.send_header("ETag", '"part"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
