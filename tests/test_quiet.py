"""The term that keeps latents silent, against its formula in float64, and which rows it looks at."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.store.store import Store
from tests.stores import SyntheticStore, make_store
from train.model.activations import BatchTopK
from train.model.quiet import Quiet, QuietConfig, left_out
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig

D, O, F = 16, 24, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("quiet") / "store", sinks={5: 40.0, 17: 300.0})


def make_model() -> Transcoder:
    activation = BatchTopK(k=4)
    config = TranscoderConfig(d_sae=F).resolve(D, activation)
    model = Transcoder(D, O, config, activation, Normalisation(torch.ones(D), 2.0, torch.zeros(O), 1.0))
    model.initialise(0)
    with torch.no_grad():
        model.b_enc.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_the_term_is_its_formula() -> None:
    """relu((<w, x> + b) / r), r a row's length over an ordinary one's, summed and scaled as a row of the batch."""
    model, rows = (
        make_model(),
        torch.randn(5, D, generator=torch.Generator().manual_seed(0))
        * torch.tensor([[0.1], [1.0], [30.0], [500.0], [1e4]]),
    )
    quiet = Quiet(model, QuietConfig(weight=0.7, rows=3), rows, batch_rows=48)
    for step in range(4):
        term = quiet.terms(step)["quiet"]
        model.zero_grad(set_to_none=True)
        term.backward()
        expected, weights, bias = 0.0, torch.zeros(D, F).double(), torch.zeros(F).double()
        for i in (3 * step + torch.arange(3)) % 5:
            x = rows[i].double()
            r = max(1.0, float(x.norm()) / D**0.5)
            pre_acts = (x @ model.W_enc.detach().double() + model.b_enc.detach().double()) / r
            unit = 0.7 * 2 / (48 * O)
            expected += unit * float(pre_acts.clamp_min(0).sum())
            weights += unit * torch.outer(x / r, (pre_acts > 0).double())
            bias += unit / r * (pre_acts > 0)
        assert float(term.detach()) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(model.W_enc.grad, weights.float(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(model.b_enc.grad, bias.float(), rtol=1e-4, atol=1e-9)
        assert model.W_dec.grad is None and model.b_dec.grad is None


def test_its_rows_are_those_that_are_left_out(made: SyntheticStore) -> None:
    store = Store.open(made.path)
    blocks, at_10 = store.record.training_blocks, {"training": True, "figures": True, "position_0": True}
    view = store.excluding(store.exclusion_at(10.0, **at_10))
    for name, row in (places := left_out(view, blocks)):
        assert blocks.start <= row // view.strata[name].stratum.rows < blocks.stop
        assert name == "000-001" or row in view.outliers[name]
    assert {name for name, _ in places} == set(view.strata)
    model = make_model()
    quiet = Quiet.of(model, QuietConfig(), view, blocks, "source", 48)
    expected = [made.values(f"strata/{name}/source")[row] for name, row in places]
    x = model.normalised_source(torch.from_numpy(np.array(expected)))
    size = (x.norm(dim=1, keepdim=True) / D**0.5).clamp_min(1)
    torch.testing.assert_close(quiet._rows, x / size)


def test_nothing_left_out_switches_it_off(made: SyntheticStore, tmp_path: Path) -> None:
    store = Store.open(made.path)
    blocks = store.record.training_blocks
    whole = store.excluding(store.exclusion_at(0.0, training=True, figures=True, position_0=False))
    for view in (store, whole):
        assert left_out(view, blocks) == []
        assert QuietConfig().resolve(view, blocks).weight == 0
        assert Quiet.of(make_model(), QuietConfig(), view, blocks, "source", 48).terms(0) == {}
    assert QuietConfig(weight=0.3).resolve(
        store.excluding(store.exclusion_at(10.0, training=True, figures=True, position_0=True)), blocks
    ) == QuietConfig(weight=0.3)
