"""An S3 server on this machine (moto), and a proxy before it that makes requests fail."""

import http.client
import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from obstore.store import S3Store, from_url

from tests.local_server import LocalServer

SETTINGS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
Fault = Literal["403", "500", "cut", "late", "silent", "lost", "kill", "kill after"]
"""What befalls a request: a refusal, an error, half of the body, an answer after `Proxy.late` seconds, none, an error
though it was done, and the end of the process that asks before it is done, or after."""


@contextmanager
def serving() -> Iterator[str]:
    """Serve S3 until the context is left; gives the endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> None:
    """Make an empty bucket."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()


class Proxy(LocalServer):
    """Passes requests on to an endpoint; `fault(number, what)` says what befalls each, such as `GET /bucket/name`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.late = endpoint, 0.1
        self.requests: list[str] = []
        self.sent = 0
        """Bytes of bodies that were asked for."""
        self.fault: Callable[[int, str], Fault | None] = lambda number, what: None
        self.parent = 0
        """Whose child is killed."""
        self._lock = threading.Lock()
        super().__init__(_handler(self))

    def note(self, what: str) -> Fault | None:
        with self._lock:
            self.requests.append(what)
            return self.fault(len(self.requests) - 1, what)

    def strike(self, fault: Fault | None, numbers: Collection[int] | None = None, what: str = "") -> None:
        """Have a fault befall requests from now on: those of these numbers, or all, whose text has `what` in it."""
        self.requests.clear()
        self.fault = lambda number, text: fault if (numbers is None or number in numbers) and what in text else None

    def kill(self) -> None:
        """Kill the child of `parent`."""
        for pid in Path(f"/proc/{self.parent}/task/{self.parent}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


@dataclass
class Bucket:
    """A bucket's address, and the proxy before its server."""

    address: str
    proxy: Proxy

    def upload(self, folder: Path, below: str) -> str:
        """Put the files of a folder there, as any tool would; returns their address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{below}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.address}/{below}"

    def put(self, name: str, data: bytes) -> None:
        self._server.put(name, data)

    def get(self, name: str) -> bytes:
        return bytes(self._server.get(name).bytes())

    def contents(self, below: str = "") -> dict[str, bytes]:
        """Every object of a folder and its bytes; from the server's memory, since an answer takes it milliseconds."""
        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[self.address.removeprefix("s3://")].keys
        start = f"{below}/" if below else ""
        return {name: keys[name].value for name in list(keys) if name.startswith(start)}

    @cached_property
    def _server(self) -> S3Store:
        """The server itself: no fault befalls this."""
        config: Any = {"aws_endpoint": self.proxy.endpoint}
        found: Any = from_url(self.address, config=config, client_options={"allow_http": True})
        return found


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # of a process that was killed, or waits no longer
                self._serve(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def _serve(self, body: bytes) -> None:
            fault = proxy.note(f"{self.command} {self.path}")
            self.close_connection = fault in ("cut", "silent", "kill", "kill after")
            if fault in ("silent", "late"):
                time.sleep(30 if fault == "silent" else proxy.late)
            if fault == "kill":
                proxy.kill()
            if fault in ("silent", "kill"):
                return
            if fault == "500":
                return self._answer(500, [], b"")
            if fault == "403":
                return self._answer(403, [], b"<Error><Code>InvalidAccessKeyId</Code></Error>")
            connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc)
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            data = found.read()
            connection.close()
            if fault == "kill after":
                return proxy.kill()
            if fault == "lost":
                return self._answer(500, [], b"")
            proxy.sent += len(data)
            return self._answer(found.status, found.getheaders(), data, cut=fault == "cut")

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            size = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
            self.send_header("Content-Length", size if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
