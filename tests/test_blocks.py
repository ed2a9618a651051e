"""Which rows of a block are stored, against a loop over single rows."""

from typing import Any

import numpy as np
import pytest

from harvest.text.packing import Windows
from harvest.writer.blocks import (
    block_counts,
    block_layout,
    over_norm,
    pack_moments,
    quotas,
    stratum_arrays,
    unpack_moments,
)
from shared.keyed import permutation
from shared.store.layout import StoreRequest
from shared.store.statistics import decode, moments_of
from shared.store.strata import Stratum, stratum_ranges
from tests.stores import decode as reference_decode
from tests.stores import encode, make_request

SEQUENCES, CONTEXT = 24, 40
SPECIAL = (0, 7)


def request(**changes: Any) -> StoreRequest:
    wanted = make_request(
        context_size=CONTEXT, edges=(0, 1, 4, 16), keep={0: 0.25, 16: 0.5}, block_sequences=SEQUENCES, seed=5
    )
    return wanted.model_copy(update=changes)


def windows(seed: int) -> Windows:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, (SEQUENCES, CONTEXT), dtype=np.int32)
    tokens[:, 0] = 0
    documents = np.cumsum(rng.random((SEQUENCES, CONTEXT)) < 0.1, axis=1).astype(np.int32)
    return Windows(tokens, documents)


def planned(wanted: StoreRequest, rows: list[int]) -> list[Stratum]:
    ranges = stratum_ranges(wanted.edges, wanted.context_size)
    return [Stratum(start=a, stop=b, rows=n, natural_rows=n) for (a, b), n in zip(ranges, rows, strict=True) if n]


def position(wanted: StoreRequest, given: Windows, sequence: int, offset: int) -> int:
    if wanted.documents == "joined":
        return offset
    row, start = given.documents[sequence], offset
    while start and row[start - 1] == row[offset]:
        start -= 1
    return offset - start


def naive(wanted: StoreRequest, stratum: Stratum, given: Windows, special: tuple, block: int, source: Any) -> list:
    """(sequence, offset) of every stored row, in order."""
    found = [
        (s, t)
        for s in range(SEQUENCES)
        for t in range(CONTEXT)
        if stratum.start <= position(wanted, given, s, t) < stratum.stop and given.tokens[s, t] not in special
    ]
    order = [found[i] for i in permutation(len(found), "rows", wanted.seed, block, stratum.start)]
    norms = [np.linalg.norm(decode(source[place])) for place in order]
    longest = sorted(range(len(order)), key=lambda i: norms[i])[
        len(order) - over_norm(len(order), wanted.max_norm_quantile) :
    ]
    kept = [place for i, place in enumerate(order) if i not in set(longest)]
    return [kept[i % len(kept)] for i in range(stratum.rows)]


CASES = [
    ({}, ()),
    ({"documents": "apart"}, ()),
    ({}, SPECIAL),
    ({"max_norm_quantile": 0.9}, ()),
    ({"documents": "apart", "max_norm_quantile": 0.8}, SPECIAL),
]


@pytest.mark.parametrize(("changes", "special"), CASES)
@pytest.mark.parametrize("block", [0, 3])
def test_arrays_equal_a_row_by_row_loop(block: int, changes: dict, special: tuple) -> None:
    wanted, given, rng = request(**changes), windows(block), np.random.default_rng(block)
    rows = quotas(wanted, [c.natural - c.special - c.over_norm for c in block_counts(wanted, given, special)])
    strata = planned(wanted, rows)
    assert len(strata) == (3 if special and not changes else 4)  # all rows at position 0 of joined documents are BOS
    layout = block_layout(wanted, strata, given, block, special)
    values = {
        wanted.source_hook: encode(rng.normal(size=(SEQUENCES, CONTEXT, 6)).astype(np.float32), "bfloat16"),
        wanted.target_hook: encode(rng.normal(size=(SEQUENCES, CONTEXT, 3)).astype(np.float32), "bfloat16"),
    }
    buffers = {
        name: np.zeros((len(layout.rows) + 5, captured.shape[2]), np.uint16) for name, captured in values.items()
    }
    for start in range(0, SEQUENCES, 10):  # as a capture does: batch by batch, the last one shorter
        places, rows_ = layout.batch(start, min(start + 10, SEQUENCES))
        for name, captured in values.items():
            buffers[name][places] = captured[start : start + 10].reshape(-1, captured.shape[2])[rows_]
    for stratum in strata:
        found = stratum_arrays(wanted, stratum, block, layout, buffers)
        expected = naive(wanted, stratum, given, special, block, values[wanted.source_hook])
        assert [
            (s - block * SEQUENCES, t)
            for s, t in zip(found["sequence"].tolist(), found["offset"].tolist(), strict=True)
        ] == expected
        assert found["position"].tolist() == [position(wanted, given, s, t) for s, t in expected]
        for side, hook in (("source", wanted.source_hook), ("target", wanted.target_hook)):
            assert (found[side] == np.array([values[hook][place] for place in expected])).all()
        kinds = [found[name].dtype for name in ("position", "sequence", "offset")]
        assert kinds == [np.uint16, np.uint32, np.uint16]
        assert len(found["source"]) == stratum.rows


def test_counts_say_where_rows_go() -> None:
    wanted, given = request(max_norm_quantile=0.9), windows(1)
    found = block_counts(wanted, given, SPECIAL, [0, 60, 10, 100])
    sevens = [(given.tokens[:, a:b] == 7).sum() for a, b in stratum_ranges(wanted.edges, CONTEXT)]
    assert [c.natural for c in found] == [24, 72, 288, 576]
    assert [c.special for c in found] == [24, *sevens[1:]]
    assert [c.over_norm for c in found] == [
        0,
        *(int((n - s) * 0.1 + 1e-9) for n, s in ((72, sevens[1]), (288, sevens[2]), (576, sevens[3]))),
    ]
    assert [c.repeated for c in found] == [0, max(0, 60 - (72 - sevens[1] - found[1].over_norm)), 0, 0]


def test_a_block_with_too_few_rows_repeats_them() -> None:
    wanted, given = request(), windows(0)
    stratum = Stratum(start=0, stop=1, rows=60, natural_rows=24)
    layout = block_layout(wanted, [stratum], given, 0, ())
    assert len(layout.rows) == 60
    assert (layout.rows[:24] == layout.rows[24:48]).all() and len(set(layout.rows[:24])) == 24
    places, rows = layout.batch(0, SEQUENCES)
    assert sorted(places.tolist()) == list(range(60))
    assert (layout.rows[places] == rows).all()


def test_blocks_differ() -> None:
    wanted, given = request(), windows(0)
    strata = planned(wanted, [6, 72, 256, 256])
    first, second = (block_layout(wanted, strata, given, block, ()).rows for block in (0, 1))
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize(
    ("rows", "quantile", "dropped"), [(100, 0.99, 1), (1000, 0.999, 1), (99, 0.99, 0), (70, 0.9, 7)]
)
def test_rows_over_a_quantile_are_counted_exactly(rows: int, quantile: float, dropped: int) -> None:
    assert over_norm(rows, quantile) == dropped


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_moments_are_of_the_stored_values(storage: str) -> None:
    rows = np.random.default_rng(0).normal(3, 2, (20_000, 5)).astype(np.float32)
    stored = encode(rows, storage)
    assert (decode(stored) == reference_decode(stored, storage)).all()
    found, values = moments_of(stored), reference_decode(stored, storage).astype(np.float64)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-6)
    assert found.rows == 20_000 and found.norms.sum() == 20_000


def test_moments_survive_saving() -> None:
    value = moments_of(np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32))
    found = unpack_moments(pack_moments({"a/source": value}), "a/source")
    assert found.rows == value.rows
    for name in ("mean", "m2", "norms"):
        assert (getattr(found, name) == getattr(value, name)).all()
