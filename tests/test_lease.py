"""The lock of a store in object storage: held by one, renewed, taken over from the dead, and noticed when lost."""

import json
import os
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from shared.errors import Stopped, UserError
from shared.files import lease
from shared.files.lease import Lease, remove_of_dead
from shared.files.object_store import Objects, Taken
from tests.local_server import LocalServer
from tests.object_server import Bucket


@pytest.fixture
def objects(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setattr(lease, "SECONDS", 6.0)
    return Objects(bucket.address)


@pytest.mark.fault(60)
def test_a_lease_that_is_renewed_is_refused_to_others_and_given_back(bucket: Bucket, objects: Objects) -> None:
    with Lease(objects, "s.lock", "store s") as held:
        first = bucket.get("s.lock")
        with pytest.raises(UserError, match=r"store s is locked: process \d+ on \S+ is writing it"):
            Lease(objects, "s.lock", "store s").__enter__()
        assert json.loads(bucket.get("s.lock"))["renewed"] > json.loads(first)["renewed"]
        held.require()
    assert bucket.contents() == {}


@pytest.mark.fault(60)
def test_a_lease_that_another_took_is_lost(bucket: Bucket, objects: Objects) -> None:
    with Lease(objects, "s.lock", "store s") as held:
        bucket.put("s.lock", b"{}")
        held._thread.join(timeout=60)
        with pytest.raises(Stopped, match="its lease was lost"):
            held.require()
    assert bucket.get("s.lock") == b"{}"  # theirs


@pytest.mark.fault(60)
def test_a_lease_that_could_not_be_renewed_in_time_is_lost(
    bucket: Bucket, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(objects, "s.lock", "store s") as held:
        bucket.proxy.strike("silent", what="PUT")
        began = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: began + 5)
        with pytest.raises(Stopped, match="did not answer for 5 s or another process took it"):
            held.require()
        bucket.proxy.strike(None)


@pytest.mark.parametrize("holder", ["dead", "elsewhere", "nonsense"])
def test_the_lease_of_a_dead_process_is_taken(
    bucket: Bucket, objects: Objects, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    """At once where it was of this machine; after it was not renewed for a while where that cannot be seen."""
    process = subprocess.Popen(["true"])
    process.wait()
    record = {"host": "here", "machine": lease._machine(), "process": process.pid, "renewed": 3}
    if holder == "elsewhere":
        record |= {"machine": "another", "process": 1}
    bucket.put("s.lock", b"nonsense" if holder == "nonsense" else json.dumps(record).encode())
    if holder != "dead":
        monkeypatch.setattr(lease, "SECONDS", 2.0)
    with Lease(objects, "s.lock", "store s"):
        monkeypatch.setattr(lease, "SECONDS", 6.0)
        watched = sum(request.startswith("GET") for request in bucket.proxy.requests)
        assert (watched > 2) == (holder != "dead")


@pytest.mark.fault(60)
def test_the_lease_of_a_dead_process_is_removed_and_no_other(bucket: Bucket, objects: Objects) -> None:
    """What is left of a writer that was killed at its last request; of one elsewhere nothing is known."""
    dead = {"host": "here", "machine": lease._machine(), "process": 2**22 + 1, "renewed": 3}
    bucket.put("dead.lock", json.dumps(dead).encode())
    bucket.put("elsewhere.lock", json.dumps({**dead, "machine": "another"}).encode())
    bucket.put("alive.lock", json.dumps({**dead, "process": os.getpid()}).encode())
    bucket.put("torn.lock", b"{")
    for name in ("dead.lock", "elsewhere.lock", "alive.lock", "torn.lock", "none.lock"):
        remove_of_dead(objects, name)
    assert sorted(bucket.contents()) == ["alive.lock", "elsewhere.lock", "torn.lock"]


def test_a_lease_that_was_given_back_is_not_held(objects: Objects) -> None:
    with Lease(objects, "s.lock", "store s") as held:
        held.require()
    with pytest.raises(Stopped, match="its lease was lost"):
        held.require()


class Google(LocalServer):
    """What Google's service answers to puts and gets: one that replaces an object names its generation."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        """Generation and content by path."""
        super().__init__(_google(self))


def _google(service: Google) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            generation, _ = service.objects.get(self.path, (0, b""))
            expected = self.headers.get("x-goog-if-generation-match")
            if expected is not None and int(expected) != generation:
                return self._answer(412)
            service.objects[self.path] = generation + 1, data
            return self._answer(200)

        def do_GET(self) -> None:
            found = service.objects.get(self.path)
            self._answer(200 if found else 404, found[1] if found else b"")

        def do_DELETE(self) -> None:
            self._answer(204 if service.objects.pop(self.path, None) else 404)

        def do_POST(self) -> None:  # a batch of objects to delete
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            service.objects.clear()
            self._answer(404)

        def _answer(self, status: int, data: bytes = b"") -> None:
            self.send_response(status)
            generation = service.objects.get(self.path, (0, b""))[0]
            self.send_header("ETag", f'"{generation}"')
            self.send_header("x-goog-generation", str(generation))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def test_on_google_an_object_is_replaced_by_its_generation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So a lease can be renewed, and a record written again."""
    with Google() as service:
        account = {"gcs_base_url": service.address, "disable_oauth": True, "private_key": "", "private_key_id": ""}
        (tmp_path / "account.json").write_text(json.dumps(account | {"client_email": ""}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", service.address)  # so that http:// is allowed
        objects = Objects("gs://bucket")
        first = objects.create("record", b"a")
        second = objects.replace("record", b"b", first)
        found = objects.get_tagged("record")
        assert found == (b"b", second)
        with pytest.raises(Taken):
            objects.replace("record", b"c", first)
        objects.replace("record", b"c", found[1])
        assert service.objects["/bucket/record"] == (3, b"c")
