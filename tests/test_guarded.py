"""The guarded search against all values in float32: the same pairs, values and weights, whatever the input."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.store.store import Store
from tests.runs import assert_same_run
from tests.stores import SyntheticStore
from train.model import blas, checkpoint
from train.model.kernels import guarded, numba_loops
from train.model.kernels.sparse_ops import sparse_ops
from train.model.sparse_latents import SparseLatents
from train.run.load_run import build_transcoder
from train.run.settings import Settings, resolve

Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WORST = 1 + 2.0**-8
"""Halfway between two numbers of bfloat16."""
KINDS = ("plain", "ties", "halfway", "outliers", "scales", "tiny", "huge", "zeros", "NaN", "inf", "negative", "small")


def all_values(x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    """[B, F] as the compiled loop computes them: what is meant by float32."""
    rows, width = len(x), W_enc.shape[1]
    flat = np.arange(rows * width)
    out = np.empty(len(flat), np.float32)
    sides = (side.detach().numpy() for side in (x, W_enc.T, b_enc))
    numba_loops.products(flat // width, flat % width, *sides, out)
    return torch.from_numpy(out).view(rows, width)


def expected(sides: Sides, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, latents and values of the n largest above 0, of equal ones the first, by sorting all of them."""
    values = all_values(*sides)
    flat = torch.where(values > 0, values, 0.0).flatten()
    order = flat.argsort(descending=True, stable=True)[:n]
    kept = order[flat[order] > 0].sort().values
    return kept // values.shape[1], kept % values.shape[1], flat[kept]


def draw(kind: str, seed: int, rows: int, width: int, latents: int) -> Sides:
    """Rows, weights that lie latent by latent, and biases, with what the search could trip over."""
    rng = np.random.default_rng(seed)
    x, W, b = (rng.standard_normal(shape) for shape in ((rows, width), (latents, width), latents))
    some = rng.random(latents) < 0.3
    match kind:
        case "ties":  # equal, and a last bit apart
            W[:] = W[rng.integers(0, 3, latents) % latents] * (1 + 2.0**-23 * rng.integers(0, 2, (latents, 1)))
            b[:] = 0
        case "halfway":
            x, W = np.sign(x) * WORST * 2.0 ** rng.integers(-2, 3, x.shape), np.sign(W) * WORST
        case "outliers":
            W[some] *= 1e4
            x[:, 0] *= 1e3
        case "scales":
            x *= 2.0 ** rng.integers(-60, 60, (rows, 1))
            W *= 2.0 ** rng.integers(-60, 60, (latents, 1))
        case "tiny":
            x, b = x * 1e-41, b * 1e-41
            W[some] *= 1e-30
        case "huge":
            W[some], x[::2] = W[some] * 1e30, x[::2] * 1e25
        case "zeros":
            x[::2], W[some], b[some] = 0, 0, 0
        case "NaN":
            x[0, 0], W[-1, -1], b[0] = np.nan, np.nan, np.nan
        case "inf":
            x[0, 0], W[-1, -1], b[0] = np.inf, -np.inf, np.inf
        case "negative":
            b -= 1e3
        case "small":  # biases decide
            x, b = x * 1e-3, b * 10
    with np.errstate(all="ignore"):
        one, other, bias = (torch.from_numpy(array.astype(np.float32)) for array in (x, W, b))
    return one, other.T, bias


def assert_expected(active: SparseLatents, smallest: torch.Tensor, sides: Sides, n: int) -> None:
    rows, latents, values = expected(sides, n)
    assert torch.equal(active.rows, rows) and torch.equal(active.latents, latents)
    assert torch.equal(active.values, values)
    assert float(smallest) == (float(values.min()) if len(values) else 0)
    counts = torch.bincount(rows, minlength=len(sides[0]))
    assert torch.equal(active.starts[1:] - active.starts[:-1], counts) and active.d_sae == len(sides[2])


CASES = given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 70),
    width=st.integers(1, 40),
    latents=st.integers(1, 70),
    share=st.floats(0, 1),
)


@settings(max_examples=300, deadline=None)
@CASES
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_pairs_and_values_are_those_of_float32(
    kind: str, seed: int, rows: int, width: int, latents: int, share: float
) -> None:
    """In three steps: without a guess, with that of the step before, and with pre-activations of all pairs."""
    sides, n = draw(kind, seed, rows, width, latents), max(1, round(share * rows * latents))
    search = guarded.Guarded()
    for whole in (False, False, True):
        active, smallest, pre_acts = search.batch_topk("torch", *sides, n, whole)
        assert_expected(active, smallest, sides, n)
        assert (pre_acts is not None) == whole
    torch.testing.assert_close(pre_acts, torch.addmm(sides[2], sides[0], sides[1]), equal_nan=True)
    assert search.figures()["search_fallbacks"] == 0


@settings(max_examples=300, deadline=None)
@CASES
@example(kind="halfway", seed=0, rows=4, width=1, latents=4, share=0)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_no_value_is_above_its_bound(kind: str, seed: int, rows: int, width: int, latents: int, share: float) -> None:
    """Also when each product is as low as sums in float32, in any order and rounded down, can make it."""
    x, W_enc, b_enc = draw(kind, seed, rows, width, latents)
    values = all_values(x, W_enc, b_enc)
    near = guarded.in_bfloat16(x, W_enc, b_enc)
    low, other = x.bfloat16().double(), W_enc.bfloat16().double()
    lost = (width - 1) * 2.0**-23 * low.abs() @ other.abs()
    worst = near._replace(product=(low @ other - lost).bfloat16())
    for one in (near, worst, guarded.in_float32("torch", x, W_enc, b_enc)):
        upper = bounds(one)
        assert not (values > upper).any()


def bounds(near: guarded.Near) -> torch.Tensor:
    """The bounds of all pairs as plainly as their formula."""
    product, rows, columns = near.product.float(), torch.from_numpy(near.rows), torch.from_numpy(near.columns)
    margin = near.relative * product.abs() + rows.T @ columns[:2] + columns[2]
    return product + near.bias + margin


def test_a_search_computes_few_values_besides_those_it_selects() -> None:
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(128, 256), torch.randn(1024, 256).T, torch.randn(1024)
    search = guarded.Guarded()
    for _ in range(3):
        search.batch_topk("torch", x, W_enc, b_enc, 8 * 128, False)
    assert 1 <= search.figures()["search_computed"] < 1.5
    assert search.figures()["search_again"] == 0


def test_a_guess_that_was_too_high_is_searched_again_and_counted() -> None:
    sides, search = draw("plain", 0, 40, 16, 64), guarded.Guarded()
    least = float(expected(sides, 200)[2].min())
    for guess in (0.5 * least, 1.001 * least, 1e9):
        search._guess = guess
        active, smallest, _ = search.batch_topk("torch", *sides, 200, False)
        assert_expected(active, smallest, sides, 200)
    assert search.figures()["search_again"] == 2 and search.figures()["search_fallbacks"] == 0


def test_a_bound_that_fails_is_counted_and_leads_to_float32_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, search = draw("plain", 0, 40, 16, 64), guarded.Guarded()
    near = guarded.in_bfloat16(*sides)
    small = near._replace(rows=near.rows * 0, columns=near.columns * 0, relative=0.0)
    monkeypatch.setattr(guarded, "in_bfloat16", lambda *_: small)
    for step in range(3):
        active, smallest, _ = search.batch_topk("torch", *sides, 200, False)
        assert_expected(active, smallest, sides, 200)
        assert search.figures()["search_fallbacks"] == step + 1
        monkeypatch.setattr(guarded, "in_bfloat16", lambda *_: pytest.fail("the bound was believed again"))


def test_rows_are_rounded_as_by_torch_and_what_is_lost_is_exact() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (300, 8), np.uint32)
    bits[:4] = [[0x3F808000], [0x3F818000], [0x7F7FFFFF], [0x00000001]]
    rows = torch.from_numpy(bits.view(np.float32))
    rows = torch.where(rows.isnan(), 1.5, rows)
    low, norms, lost = guarded._rounded(rows)
    assert torch.equal(low, rows.bfloat16())
    torch.testing.assert_close(torch.from_numpy(norms), rows.double().norm(dim=1))
    torch.testing.assert_close(torch.from_numpy(lost), (rows.double() - low.double()).norm(dim=1))


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("dead", [0, 3, 30, 64])
def test_the_largest_of_rows_among_some_latents_by_a_product_with_them_alone(library: blas.Blas, dead: int) -> None:
    x, W_enc, b_enc = draw("plain", 0, 20, 16, 64)
    among = torch.randperm(64, generator=torch.Generator().manual_seed(0)) < dead
    found = guarded.row_topk(library, x, W_enc, b_enc, 5, among)
    wanted = sparse_ops("compiled").row_topk(all_values(x, W_enc, b_enc), 5, among)
    assert torch.equal(found.latents, wanted.latents) and torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.starts, wanted.starts) and found.d_sae == 64
    torch.testing.assert_close(found.values, wanted.values)


SMALL = ("--set", "transcoder.d_sae=64", "--set", "activation.k=2", "--set", "rows.batch_rows=48", "--set", "threads=1",
         "--set", "auxk.dead_after_tokens=60", "--set", "optimizer.lr=0.01", "--set", "log_every=7")  # fmt: skip


def dense_batch_topk(
    self: guarded.Guarded, library: blas.Blas, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, n: int, whole: bool
) -> Any:
    """As `Guarded.batch_topk`, from all values in float32."""
    found = sparse_ops("compiled").batch_topk(all_values(x, W, b), n, torch.zeros(()))
    return *found, blas.product(library, x, W).add_(b.detach()) if whole else None


def test_a_run_ends_as_one_that_computes_all_values_in_float32(
    command, pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with latents that die and a k that warms up; resumed, too."""
    warm = ("--set", "activation.k_start=4", "--set", "activation.k_warmup_steps=40", "--set", "checkpoint.every=30")
    common = ("run", "--store", pristine.path, "--runs", tmp_path, "--steps", 60, *SMALL, *warm)
    mine, stopped = (command(*common, "--set", "product_dtype=guarded-bfloat16").path for _ in range(2))
    timing = json.loads((mine / "timing.jsonl").read_text().splitlines()[-1])
    assert 1 <= timing["search_computed"] < 1.5 and timing["search_fallbacks"] == 0
    metrics = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
    assert all(row["terms"]["auxk"] > 0 for row in metrics)
    shutil.rmtree(checkpoint.folder(stopped, 60))
    assert command("resume", stopped).code == 0
    assert_same_run(mine, stopped)
    monkeypatch.setattr(guarded.Guarded, "batch_topk", dense_batch_topk)
    assert_same_run(mine, command(*common, "--set", "product_dtype=guarded-bfloat16").path)


def test_auto_takes_the_guarded_search_where_it_can_be_and_pays(
    pristine: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(**changes: Any) -> str:
        wanted = Settings(transcoder={"d_sae": 64}, rows={"batch_rows": 48}, **changes)
        return resolve(Store.open(pristine.path), wanted, None).settings.product_dtype

    for flags, expected in (("fpu avx512_bf16", "guarded-bfloat16"), ("amx_bf16", "guarded-bfloat16"), ("", "float32")):
        monkeypatch.setattr(blas, "_first_line", lambda _, flags=flags: f"flags : {flags} avx2")
        assert chosen() == expected
        assert chosen(kernels="plain") == chosen(activation={"kind": "topk"}) == "float32"
        assert chosen(product_dtype="float32") == "float32" and chosen(product_dtype="bfloat16") == "bfloat16"
    for changes in ({"kernels": "plain"}, {"activation": {"kind": "topk"}}):
        with pytest.raises(UserError, match="guarded-bfloat16 is for activation.kind = batchtopk on kernels = comp"):
            chosen(product_dtype="guarded-bfloat16", **changes)


@pytest.mark.parametrize("recorded", ["auto", "float32", "bfloat16"])
def test_what_older_runs_recorded_keeps_its_meaning(pristine: SyntheticStore, recorded: str) -> None:
    """`auto` is what a record without the setting is read as."""
    store = Store.open(pristine.path)
    config = resolve(store, Settings(transcoder={"d_sae": 64}, rows={"batch_rows": 48}), None)
    old = config.settings.model_copy(update={"product_dtype": recorded})
    model = build_transcoder(config.model_copy(update={"settings": old}), store)
    assert model.guarded is None
    assert model.product_dtype == (torch.bfloat16 if recorded == "bfloat16" else torch.float32)
