"""The lock of a store in object storage: held by one, renewed, taken over from the dead, and noticed when lost."""

import json
import subprocess
import time

import pytest

from shared.errors import Stopped, UserError
from shared.files import lease
from shared.files.lease import Lease
from shared.files.object_store import Objects
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
