"""How often a run does what lies around its steps, where that is left to it."""

from pathlib import Path

import pytest

from shared.errors import UserError
from shared.store.store import Store
from tests.gpu.fake_device import fake_cuda
from tests.stores import make_store
from train.evaluation.evaluated_blocks import evaluated_rows
from train.run.cadences import ON_CPU, Cadences, chosen
from train.run.settings import load_settings, resolve


def test_on_the_cpu_cadences_are_the_same_for_every_run() -> None:
    assert chosen("cpu", 4882, 1024, 2304, 18432, 10**6) == ON_CPU == Cadences(50, 100, 2000, 500)


def test_on_cuda_they_are_longer_the_less_a_step_costs() -> None:
    """A step of 2 * 1,024 * 2,304 * 18,432 = 87 GFLOP is taken for 1.7 ms, a small one for 1 ms."""
    gemma = chosen("cuda", 100_000, 1024, 2304, 18432, 1_179_648)
    assert gemma == Cadences(log=100, monitor=500, evaluation=10_000, checkpoint=20_000)
    small = chosen("cuda:1", 400_000, 1024, 128, 4096, 1000)
    assert small == Cadences(log=200, monitor=1000, evaluation=2000, checkpoint=50_000)
    assert chosen("cuda", 4882, 1024, 2304, 18432, 1_179_648).checkpoint == 1220
    assert chosen("cuda", 100_000, 4096, 8192, 131072, 10**6) == Cadences(
        log=50, monitor=100, evaluation=2000, checkpoint=500
    )


def test_a_run_records_them_and_given_ones_stay(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store").path)
    rows = sum(s.rows for s in store.record.plan.stored_strata)
    assert evaluated_rows(store.record) == 3 * rows  # 1 block reported, 1 not
    given = [
        "steps=900",
        "evaluation.every=7",
        "transcoder.d_sae=64",
        "activation.k=6",
        "activation.k_start=6",
        "kernels=plain",
    ]
    for device, expected, delay in (("cpu", (50, 100, 7, 500), 0), ("cuda", (200, 225, 7, 500), 112)):
        with fake_cuda():
            found = resolve(store, load_settings("tiny", [*given, f"device={device}"]), None).settings
        assert (found.log_every, found.monitor.every, found.evaluation.every, found.checkpoint.every) == expected
        assert found.monitor.delay == delay


@pytest.mark.parametrize("delay", [100, 101])
def test_a_report_that_would_not_be_complete_before_the_next_is_refused(tmp_path: Path, delay: int) -> None:
    store = Store.open(make_store(tmp_path / "store").path)
    given = ["steps=900", "transcoder.d_sae=64", "activation.k=6", "activation.k_start=6", f"monitor.delay={delay}"]
    with pytest.raises(UserError, match=f"monitor.delay = {delay} is not below monitor.every = 100"):
        resolve(store, load_settings("tiny", given), None)
