"""A local folder as a bucket: an S3 server for reading, whose answers take little CPU and can be late.

It answers what a reader asks: lists, whole objects and ranges of them. Benches use it where the server of the tests,
which knows all of S3 and takes milliseconds of CPU for an answer, would be what is measured.
"""

import asyncio
import os
import threading
from email.utils import formatdate
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class FolderServer:
    """Serves `folder` as the bucket of any name. A context: it serves until it is left."""

    def __init__(self, folder: Path, late: float = 0.0) -> None:
        """Answer every request `late` seconds after it came."""
        self.folder, self.late = folder, late
        self.requests = 0
        self.sent = 0
        """Bytes of bodies."""
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.run_until_complete(asyncio.start_server(self._converse, "127.0.0.1", 0))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._listening.close()
        self._loop.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await asyncio.sleep(self.late)
                status, headers, body = self._answer(head)
                self.requests, self.sent = self.requests + 1, self.sent + len(body)
                lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
                writer.write("\r\n".join(lines).encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):  # it was closed
            writer.close()

    def _answer(self, head: str) -> tuple[str, dict[str, object], bytes]:
        """Return the status, headers and body that answer a request."""
        first, *lines = head.split("\r\n")
        method, target, _ = first.split()
        url = urlsplit(target)
        query, name = parse_qs(url.query), unquote(url.path).lstrip("/").partition("/")[2]
        if "list-type" in query:
            body = self._listed(query.get("prefix", [""])[0])
            return "200 OK", {"Content-Type": "application/xml", "Content-Length": len(body)}, body
        path = self.folder / name
        if method not in ("GET", "HEAD") or not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code></Error>"
            return "404 Not Found", {"Content-Type": "application/xml", "Content-Length": len(body)}, body
        found = path.stat()
        wanted = next((line.partition("=")[2] for line in lines if line.lower().startswith("range:")), "")
        start, stop, status = 0, found.st_size, "200 OK"
        headers: dict[str, object] = {
            "ETag": f'"{found.st_mtime_ns:x}"',
            "Last-Modified": formatdate(found.st_mtime, usegmt=True),
        }
        if wanted:
            low, _, last = wanted.partition("-")
            start, stop, status = int(low), min(int(last) + 1, stop), "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.st_size}"
        headers["Content-Length"] = stop - start
        return status, headers, _part(path, start, stop) if method == "GET" else b""

    def _listed(self, prefix: str) -> bytes:
        """Return the list of all files whose names begin so."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.folder, followlinks=True) for name in names)
        names = {str(path.relative_to(self.folder)): path.stat().st_size for path in found}
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"0"</ETag><Size>{size}</Size></Contents>'
            for name, size in sorted(names.items())
            if name.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


def _part(path: Path, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), stop - start, start)
