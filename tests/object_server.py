"""An S3 server on this machine (moto), and a proxy before it that makes requests fail."""

import http.client
import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer

from tests.local_server import LocalServer

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
}
Fault = str
"""What befalls a request: `500`, `cut` (half of the body), `late` (answered after 0.1 s), `silent` (never answered),
`lost` (done, and answered with 500), `kill` (this process ends before it), `kill after`."""


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


def upload(folder: Path, address: str) -> None:
    """Copy a store there, as any tool would."""
    from obstore.store import from_url

    store = from_url(address, client_options={"allow_http": True})
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path.read_bytes())


class Proxy(LocalServer):
    """Passes requests on to an endpoint; `fault(number, method, path)` says what befalls each."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.fault: Callable[[int, str, str], Fault | None] = lambda number, method, path: None
        self.requests: list[str] = []
        self._lock = threading.Lock()
        super().__init__(_handler(self))

    def note(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            number = len(self.requests) - 1
        return self.fault(number, method, path)

    def only(self, numbers: Sequence[int], fault: Fault) -> None:
        """Have one fault befall some requests, counted from now."""
        self.requests.clear()
        self.fault = lambda number, method, path: fault if number in numbers else None


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.note(self.command, self.path)
            if fault == "kill":
                os._exit(9)
            if fault == "silent":
                time.sleep(30)
                self.close_connection = True
                return
            if fault == "late":
                time.sleep(0.1)
            if fault == "500":
                self._answer(500, [], b"")
                return
            connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc)
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            data = found.read()
            connection.close()
            if fault == "kill after":
                os._exit(9)
            if fault == "lost":
                self._answer(500, [], b"")
                return
            self._answer(found.status, found.getheaders(), data, cut=fault == "cut")

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
            if cut:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
