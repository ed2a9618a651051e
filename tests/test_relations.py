"""The map of directions and the parents of latents, against slow dense references."""

import numpy as np
import torch

from train.model.sparse_latents import SparseLatents
from train.report.relations import LEAST_LIFT, LEAST_ROWS, LEAST_SHARE, direction_map, refinements


def test_the_map_is_the_first_two_principal_components() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]
    live = np.arange(3, 40, 2)
    found, share = direction_map(rows.astype(np.float32), live)
    centred = rows[live] - rows[live].mean(0)
    left, values, _ = np.linalg.svd(centred)
    for axis in range(2):
        expected = left[:, axis] * values[axis]
        expected *= 1 if expected.max() >= -expected.min() else -1
        np.testing.assert_allclose(found[live, axis], expected, atol=1e-5)
    assert np.isclose(share, (values[:2] ** 2).sum() / (values**2).sum())
    assert np.isnan(found[np.setdiff1d(np.arange(40), live)]).all()
    assert np.isnan(direction_map(rows, live[:1])[0]).all()


def test_a_parent_is_the_earlier_latent_that_goes_with_it_best() -> None:
    rng = np.random.default_rng(1)
    total, prefixes = 2000, np.array([4] * 4 + [8] * 4 + [16] * 8)
    active = rng.random((total, 16)) < 0.03
    active[:, 0] |= rng.random(total) < 0.3
    active[:, 1] = rng.random(total) < 0.95  # with everything, so nobody's parent
    active[:, 5] = active[:, 0] & (rng.random(total) < 0.4)
    active[:, 9] = active[:, 5] & (rng.random(total) < 0.6)
    active[:, 12] = False
    active[:5, 12] = active[:5, 0] = True  # too few rows
    parents, shares = np.full(16, -1), np.zeros(16)
    for f in range(16):
        mine, best = active[:, f], 0.0
        for g in range(16):
            if prefixes[g] >= prefixes[f] or mine.sum() < LEAST_ROWS:
                continue
            there, elsewhere = active[mine, g].mean(), active[~mine, g].mean()
            phi = np.corrcoef(mine, active[:, g])[0, 1]
            if there >= LEAST_SHARE and there >= LEAST_LIFT * elsewhere and phi > best:
                best, parents[f], shares[f] = phi, g, there
    rows, latents = np.nonzero(active)
    sparse = SparseLatents.of(
        torch.from_numpy(rows), torch.from_numpy(latents), torch.ones(len(rows)), torch.Size(active.shape)
    )
    found = refinements(sparse, prefixes)
    assert found.parent.tolist() == parents.tolist() and (parents[5], parents[9]) == (0, 5)
    np.testing.assert_allclose(found.share, shares)
