"""Other readers of the store: tensorstore and xarray, raw and packed. (Stock zarr reads one in most tests.)"""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray

from shared.store.layout import ARRAYS
from tests.llms import command
from tests.stores import make_store


@pytest.fixture(scope="module", params=["raw", "packed"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """The Zarr root of a store, and its arrays by path."""
    folder = tmp_path_factory.mktemp("interop")
    store = make_store(folder / "raw", block_sequences=64, tokenizer=True)
    if request.param == "packed":
        assert command("pack", store.path, folder / "packed").code == 0
    return folder / request.param / ARRAYS, store.arrays


def test_tensorstore_reads_every_array(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, arrays = made
    for name, rows in arrays.items():
        place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / name)}}
        found = tensorstore.open(place, read=True).result()
        assert found.dtype.numpy_dtype == rows.dtype and (found.read().result() == rows).all()
        assert (found[len(rows) // 3 : len(rows) // 2].read().result() == rows[len(rows) // 3 : len(rows) // 2]).all()


def test_xarray_reads_every_array_with_its_dimensions(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, arrays = made
    tree = xarray.open_datatree(root, engine="zarr", consolidated=False)
    for name, rows in arrays.items():
        found = tree[name]
        assert (found.to_numpy() == rows).all()
        assert found.dims[0] == ("sequence" if name in ("tokens", "documents") else "row")
