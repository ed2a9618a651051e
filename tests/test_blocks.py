"""The rows of each stratum against a loop over single rows."""

import numpy as np
import pytest

from harvest.blocks import (
    decode,
    pack_moments,
    stored_moments,
    stratum_arrays,
    stratum_places,
    unpack_moments,
)
from shared.keyed import permutation
from shared.statistics import moments_of
from tests.stores import decode as reference_decode
from tests.stores import encode, make_request

REQUEST = make_request(context_size=40, edges=(0, 1, 4, 16), keep={0: 0.25, 16: 0.5}, block_sequences=24, seed=5)


@pytest.mark.parametrize("block", [0, 3])
def test_arrays_equal_a_row_by_row_loop(block: int) -> None:
    rng = np.random.default_rng(block)
    source = rng.integers(0, 2**15, (24, 40, 6), dtype=np.uint16)
    target = rng.integers(0, 2**15, (24, 40, 3), dtype=np.uint16)
    for stratum in REQUEST.strata:
        found = stratum_arrays(REQUEST, stratum, block, source, target)
        order = permutation(stratum.natural_rows, "rows", 5, block, stratum.start)
        for row in range(stratum.rows):
            sequence, position = int(order[row]) // stratum.width, stratum.start + int(order[row]) % stratum.width
            assert (found["source"][row] == source[sequence, position]).all()
            assert (found["target"][row] == target[sequence, position]).all()
            assert found["position"][row] == position
            assert found["sequence"][row] == block * 24 + sequence
        assert [found[name].dtype for name in ("position", "sequence")] == [np.uint16, np.uint32]
        assert all(len(rows) == stratum.rows for rows in found.values())


def test_each_row_is_kept_at_most_once_and_blocks_differ() -> None:
    for stratum in REQUEST.strata:
        places = {block: list(zip(*stratum_places(REQUEST, stratum, block), strict=True)) for block in (0, 1)}
        assert len(set(places[0])) == stratum.rows
        assert places[0] != places[1]
        assert all(stratum.start <= position < stratum.stop for _, position in places[0])


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_moments_are_of_the_stored_values(storage: str) -> None:
    rows = np.random.default_rng(0).normal(3, 2, (20_000, 5)).astype(np.float32)
    stored = encode(rows, storage)
    assert (decode(stored) == reference_decode(stored, storage)).all()
    found, values = stored_moments(stored), reference_decode(stored, storage).astype(np.float64)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-10)
    assert found.rows == 20_000 and found.norms.sum() == 20_000


def test_moments_survive_saving() -> None:
    value = moments_of(np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32))
    found = unpack_moments(pack_moments({"a/source": value}), "a/source")
    assert found.rows == value.rows
    for name in ("mean", "m2", "norms"):
        assert (getattr(found, name) == getattr(value, name)).all()
