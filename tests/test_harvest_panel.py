"""The panel of a harvest: blocks, bytes there and to come, and what they are made with."""

import re

import pytest

from harvest.run.harvest_panel import Status
from harvest.writer.target import Target
from shared.console.panel import Pace, size
from shared.console.terminal import Verbosity, with_verbosity
from shared.files.disk_usage import Measured, size_of
from tests.stores import SyntheticStore
from tests.test_panel import drawn

FREE = 7 * 2**30


def a_status(store: SyntheticStore, missing: set[int], there: int = 1) -> Status:
    request, record = store.record.request, store.record
    return Status(
        targets=[Target(path=store.path, request=request, plan=record.plan)],
        missing={store.path: missing},
        mine=frozenset(range(there, 5)),
        there=there,
        widths={request.source_hook: record.d_in, request.target_hook: record.d_out},
        batch=4,
        device="cpu",
        workers=2,
        disk=Measured(lambda: FREE),
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_harvest_is_shown_at_every_width(pristine: SyntheticStore, width: int) -> None:
    block = size_of(*(pristine.path / "activations.zarr" / "strata").glob("*/*/c")) // 5
    rows = sum(stratum.rows for stratum in pristine.record.plan.stored_strata)
    pace = Pace(done=3 * 512, total=5 * 512, unit="tokens", seconds=4, rate=256)
    status = a_status(pristine, {3, 4})
    lines = drawn(status.panel(pace), width)
    text = "\n".join(lines)
    assert {len(line) for line in lines} == {width}
    assert "1,536/2,560 tokens  60%" in lines[1]
    assert f"256 tokens/s  {256 * rows / 512:,.0f} rows/s  0:04 left  0:04 elapsed" in lines[2]
    figures = {
        "blocks": "3 of 5", "resumed": "1 blocks were there", "rows": f"{3 * rows:,} of each layer",
        "written": size(3 * block), "to come": size(2 * block), "disk": "7 GiB free",
        "batch": "4 windows of 32", "device": "cpu, 2 threads", "store": pristine.path.name,
    }  # fmt: skip
    for name, value in figures.items():
        assert re.search(rf"{name} +{re.escape(value)}", text), name
    status.missing[pristine.path].discard(3)
    assert re.search(r"blocks +4 of 5", "\n".join(drawn(status.panel(pace), width)))


def test_a_verbose_harvest_says_what_it_reads_and_writes(pristine: SyntheticStore) -> None:
    status, pace = a_status(pristine, set(), there=0), Pace(done=9, total=9, unit="tokens", seconds=1, rate=9)
    with with_verbosity(Verbosity.VERBOSE):
        text = "\n".join(drawn(status.panel(pace), 80))
    assert "resumed" not in text and "synthetic, float32" in text and "blocks.3.hook_mlp_out" in text
    for stratum in pristine.record.plan.stored_strata:
        assert f"{stratum.name}  {stratum.rows:,} rows per block" in text


def test_lines_of_a_harvest(pristine: SyntheticStore) -> None:
    status = a_status(pristine, {4})
    block = size_of(*(pristine.path / "activations.zarr" / "strata").glob("*/*/c")) // 5
    assert status.note() == f"4/5 blocks  {size(4 * block)} written"
    assert status.detail(3) == (
        f"block 3 is written  {status.note()}  {size(block)} to come  7 GiB free  batch 4 windows of 32  cpu, 2 threads"
    )
