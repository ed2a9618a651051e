"""The map of directions, parents of latents and their trees, against slow dense references."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from shared.store.store import Store
from train.model.sparse_latents import SparseLatents
from train.report import families
from train.report.latents import MAP_SHARE
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


def table_of(refines: list[int | None], **columns: Any) -> pa.Table:
    n = len(refines)
    rows: dict[str, Any] = {
        "refines": pa.array(refines, pa.int32()),
        "refines_share": [None if one is None else 0.75 for one in refines],
        "prefix": pa.array([2] * 2 + [4] * 2 + [n] * (n - 4), pa.int32()),
        "density": [0.5 / (f + 1) for f in range(n)],
        "max": [1.0] * n,
        "label": pa.array([None] * n, pa.string()),
        "peaks": [[f, 100 + f] for f in range(n)],
        "map_x": pa.array(np.arange(n), pa.float32()),
        "map_y": pa.array(np.arange(n), pa.float32()),
    }
    return pa.table(rows | columns).replace_schema_metadata({MAP_SHARE: b"0.25"})


def test_trees_are_of_roots_with_the_most_descendants(tmp_path: Path) -> None:
    table = table_of([None, None, 0, 1, 2, 2, 4, 0, None, 1], label=pa.array(["zero"] + [None] * 9, pa.string()))
    store = cast(Store, SimpleNamespace(tokenizer=tmp_path))
    found = families.refinements(table, store)
    assert [(one.prefix, one.live, one.refining) for one in found.groups] == [(2, 2, 0), (4, 2, 2), (10, 6, 5)]
    assert [tree.latent for tree in found.trees] == [0, 1]
    zero = found.trees[0]
    assert (zero.label, zero.share, zero.peaks) == ("zero", None, ["#0", "#100"])
    assert [one.latent for one in zero.children] == [2, 7] and zero.children[0].share == 0.75
    assert [one.latent for one in zero.children[0].children[0].children] == [6]


def test_the_map_has_the_root_of_every_active_latent() -> None:
    missing = pa.array([0, 1, 2, None, 4, 5, 6], pa.float32())
    found = families.latent_map(table_of([None, None, 0, 1, 2, None, 4], map_x=missing))
    assert found.latents == [0, 1, 2, 4, 5, 6] and found.x == [0, 1, 2, 4, 5, 6] and found.share == 0.25
    assert found.root == [0, 1, 0, 0, 5, 0] and found.prefix == [2, 2, 4, 7, 7, 7]
