"""Several processes under torchrun: one store, the bytes of one process; killed, and carried on by more of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.store.layout import ARRAYS, STORE, TOKENS
from tests.llms import ROOT, command, contents, make_gemma, texts, write_jsonl

BLOCK_TOKENS = 16 * 32
SETTINGS = (
    "windows.context_size=32",
    "store.edges=[0,1,4,16]",
    "store.block_sequences=16",
    "capture.batch_sequences=4",
)


def launch(processes: int, line: list[object]) -> "subprocess.Popen[str]":
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    whole = [*runner, "-m", "harvest", *line]
    return subprocess.Popen(
        [str(part) for part in whole],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
    )


@pytest.mark.fault(62)
@pytest.mark.slow(30)
def test_processes_share_a_harvest_and_others_carry_it_on(tmp_path: Path) -> None:
    model = make_gemma(tmp_path / "model")
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": one} for one in texts(400)])
    options = [part for one in SETTINGS for part in ("--set", one)]
    line = ["run", "--model", model, "--text", text, "--layer", 2, "--tokens", 30 * BLOCK_TOKENS, *options]
    expected = command(*line, "--cache", tmp_path / "one").store
    pair = launch(2, [*line, "--cache", tmp_path / "many"])
    store = tmp_path / "many" / expected.name
    began = time.monotonic()
    while len(list(store.glob("ledger/*.json"))) < 4:
        assert pair.poll() is None, pair.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.005)
    second = command(*line, "--cache", tmp_path / "many")
    assert second.code == 2 and "is locked: process" in second.err
    os.killpg(pair.pid, signal.SIGKILL)
    pair.communicate()
    for name in list(store.glob("ledger/*.json"))[2:]:
        name.unlink()  # however far it came, there is work left
    (store / STORE).unlink(missing_ok=True)
    three = launch(3, [*line, "--cache", tmp_path / "many"])
    out, err = three.communicate(timeout=200)
    assert three.returncode == 0, err
    assert out.splitlines() == [str(store)]
    assert contents(store) == contents(expected)

    damaged = store / ARRAYS / TOKENS / "zarr.json"  # what the first process alone makes whole again
    damaged.write_bytes(damaged.read_bytes()[:10])
    pair = launch(2, [*line, "--cache", tmp_path / "many"])
    out, err = pair.communicate(timeout=200)
    assert pair.returncode == 0, err
    assert out.splitlines() == [str(store)] and contents(store) == contents(expected)
