"""docs/scale.md is what its bench computes, and its bytes are those that a store would have."""

import pytest

from shared.store.layout import block_bytes, row_specs
from shared.store.row_arrays import StorageType
from tests.bench import scale
from tests.stores import make_request, make_strata


def test_the_page_is_what_the_bench_computes() -> None:
    assert scale.DOCUMENT.read_text() == scale.page(scale.measured()), "run python -m tests.bench.scale"


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("width", [2304, 5376])
def test_a_pair_has_the_bytes_of_its_arrays(width: int, storage: StorageType) -> None:
    """But for the shards' indexes, and the units of int8."""
    request = make_request(block_sequences=256, context_size=1024, edges=(0, 1, 4, 16, 64, 256), storage=storage)
    strata = make_strata(request)
    found = block_bytes(row_specs(request, strata, width, width)) / sum(stratum.rows for stratum in strata)
    name = "int8_row_bytes" if storage == "int8" else "row_bytes"
    (expected,) = {getattr(model, name) for model in scale.MODELS if model.width == width}
    assert expected < found < 1.001 * expected


def test_hours_follow_from_bytes_and_rates() -> None:
    small = scale.figures_of(scale.MODELS[0], {key: value for key, (value, _) in scale.measured().items()})
    assert small["all pairs"][0] == pytest.approx(1e9 * 26 * 9224 / 1e12)
    assert small["harvest on one node, writing, ESTIMATE"][0] == pytest.approx(1e9 * 26 * 9224 / 12.5e9 / 3600)
    one_layer = small["the pairs of one layer"][0] * 1e12
    steps, step = 1e9 / scale.BATCH, small["a step on one GPU, ESTIMATE"][0] / 1e3
    assert small["read rate of one GPU, training, ESTIMATE"][0] * 1e9 == pytest.approx(one_layer / (steps * step))
    assert small["training on one node, computing, ESTIMATE"][0] == pytest.approx(26 * steps * step / 8 / 3600)
