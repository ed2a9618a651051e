"""Scans of decoder rows that two share: what each gets is what it would have found alone."""

import pytest
import torch

from tests.gpu.fake_device import fake_cuda
from tests.test_monitor import F, make_model
from train.duplicates import scans
from train.duplicates.directions import close_pairs
from train.duplicates.scans import Scans

LIVE = torch.arange(F)[1:]


def test_two_who_ask_after_the_same_step_cost_one_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    floors: list[float] = []

    def counted(*args):
        floors.append(args[2])
        return close_pairs(*args)

    monkeypatch.setattr(scans, "close_pairs", counted)
    model = make_model()
    shared = Scans(model)
    shared.expect(10, 0.2)
    rows = model.unit_decoder()
    for ask, done, floor in (
        (shared.reported, 10, 0.5),
        (shared.mined, 10, 0.2),
        (shared.reported, 15, 0.5),
        (shared.mined, 20, 0.2),
        (shared.reported, 30, 0.5),
        (shared.reported, 35, 0.5),
        (shared.mined, 40, 0.2),
    ):
        pairs, cosines = ask(done, LIVE, floor)
        expected = torch.triu(rows @ rows.T, 1)[1:, 1:] > floor
        assert torch.equal(torch.stack(list(pairs)) - 1, torch.stack(expected.nonzero(as_tuple=True)))
        assert torch.allclose(cosines, (rows[pairs.first] * rows[pairs.second]).sum(1))
        assert len(cosines) >= 2
    assert floors == [0.2, 0.5, 0.2, 0.2, 0.5, 0.2]  # what is found at 10 serves both


def test_random_rows_are_scanned_only_where_some_can_be_close() -> None:
    model = make_model()
    assert not Scans(model, random_at_start=True).none_at(0, 0.3)  # of 8 numbers each
    model.W_dec = torch.nn.Parameter(torch.randn(F, 2304, generator=torch.Generator().manual_seed(0)))
    model.normalise_decoder()
    found = Scans(model, random_at_start=True)
    assert found.none_at(0, 0.3) and not found.none_at(1, 0.3) and not found.none_at(0, 0.1)
    assert not Scans(model).none_at(0, 0.3)
    assert not len(found.mined(0, LIVE, 0.3)[1])


def test_scans_fall_on_reports_on_cuda_alone() -> None:
    with fake_cuda():
        for device, expected in (("cpu", 40), ("cuda", 50)):
            assert Scans(make_model().to(device), 25).steps_between(32, 0.0125) == expected
