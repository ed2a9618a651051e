"""The order of rows against a naive stream, and the mixture's counts."""

import numpy as np
import pytest

from shared.errors import UserError
from shared.keyed import permutation
from shared.store.reader import RowReader, RowsConfig, RowStream, rows_per_stratum
from shared.store.store import Store
from shared.store.strata import Stratum
from tests.stores import SyntheticStore

AT_0 = "max_position_0_batch_share"


def strata(*natural: int) -> list[Stratum]:
    return [Stratum(start=i, stop=i + 1, natural_rows=n, rows=n) for i, n in enumerate(natural)]


@pytest.mark.parametrize(
    ("natural", "settings", "expected"),
    [
        ((256, 768, 3072, 12288, 49152), {"batch_rows": 1024}, [4, 12, 48, 192, 768]),
        (
            (256, 768, 3072, 12288, 49152),
            {"batch_rows": 1024, AT_0: 0.001},
            [1, 12, 48, 193, 770],
        ),
        ((256, 768, 3072, 12288, 49152), {"batch_rows": 1024, AT_0: 0}, [0, 12, 48, 193, 771]),
        ((100, 100, 100), {"batch_rows": 10, "alpha": 0, AT_0: 1}, [4, 3, 3]),
        ((100, 900), {"batch_rows": 10, "alpha": 0.5, AT_0: 0.2}, [2, 8]),
        ((100,), {"batch_rows": 7, AT_0: 1}, [7]),
    ],
)
def test_a_batch_has_exact_counts_per_stratum(natural: tuple[int, ...], settings: dict, expected: list[int]) -> None:
    assert rows_per_stratum(strata(*natural), RowsConfig(**settings)) == expected


def test_a_cap_on_the_only_stratum_is_a_users_error() -> None:
    with pytest.raises(UserError, match=AT_0):
        rows_per_stratum(strata(100), RowsConfig(batch_rows=10, max_position_0_batch_share=0.5))


@pytest.mark.parametrize(
    ("windows", "given", "expected"),
    [(256, "auto", 64), (252, "auto", 64), (16, "auto", 5), (1, "auto", 1), (4, 64, 64)],
)
def test_runs_are_as_long_as_blocks_allow(windows: int, given: int | str, expected: int) -> None:
    resolved = RowsConfig(run_rows=given).resolve(windows)
    assert resolved.run_rows == expected and resolved.resolve(10**6) == resolved


def naive_stream(rows: int, run: int, epochs: int, *key: int | str) -> list[int]:
    """All rows of the first epochs, one by one."""
    runs = [list(range(low, min(low + run, rows))) for low in range(0, rows, run)]
    return [row for epoch in range(epochs) for i in permutation(len(runs), *key, epoch) for row in runs[i]]


@pytest.mark.parametrize(("rows", "run"), [(64, 8), (61, 8), (5, 64), (1, 1), (129, 64), (7, 1)])
def test_a_stream_is_a_keyed_permutation_of_runs_per_epoch(rows: int, run: int) -> None:
    stream, expected = RowStream(rows, run, "k", 1), naive_stream(rows, min(run, rows), 4, "k", 1)
    found = [row for low, high in stream.runs(0, 3 * rows) for row in range(low, high)]
    assert found == expected[: 3 * rows]
    assert sorted(found[:rows]) == sorted(found[rows : 2 * rows]) == list(range(rows))
    for start in range(2 * rows):  # every position, in any order of asking
        count = min(11, rows)
        assert [r for a, b in stream.runs(start, count) for r in range(a, b)] == expected[start : start + count]


def test_every_array_of_a_batch_is_of_the_same_rows(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=40, run_rows=8), seed=3)
    kinds = {"source": ("u2", [16]), "position": ("u2", []), "sequence": ("u4", []), "offset": ("u2", [])}
    for step in (0, 9):
        for name, (kind, width) in kinds.items():
            found = reader.read(step, name, np.zeros((40, *width), kind))
            rows = [
                synthetic.arrays[f"strata/{s.stratum.name}/{name}"][low:high] for s, low, high, _ in reader.runs(step)
            ]
            assert (found == np.concatenate(rows)).all()


def test_the_rows_of_a_step_stay_what_they_are(synthetic: SyntheticStore) -> None:
    """Recorded: a change here would make every finished run's `batch(step)` another."""
    store = Store.open(synthetic.path)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=24, run_rows=8), seed=5)
    assert reader.counts == [0, 2, 9, 13]
    found = {step: [(s.stratum.name, low, high, at) for s, low, high, at in reader.runs(step)] for step in (0, 40)}
    assert found == {
        0: [
            ("001-004", 152, 154, 0),
            ("004-016", 944, 952, 2),
            ("004-016", 448, 449, 10),
            ("016-032", 1144, 1152, 11),
            ("016-032", 648, 653, 19),
        ],
        40: [
            ("001-004", 184, 186, 0),
            ("004-016", 632, 640, 2),
            ("004-016", 552, 553, 10),
            ("016-032", 1096, 1104, 11),
            ("016-032", 624, 629, 19),
        ],
    }
