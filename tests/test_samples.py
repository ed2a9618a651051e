"""Samples against a slow, obvious reference; what they are in runs is in test_train_samples."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from shared.errors import CorruptData, Stopped
from shared.keyed import hash_integers
from shared.store.store import Store
from tests.stores import SyntheticStore, make_store
from train.data.batches import Side, StoreRows
from train.model.activations import BatchTopK
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.samples import context_loops
from train.samples import encode as encoding
from train.samples.encode import Activations, encode
from train.samples.parquet import contexts_table, latents_table
from train.samples.select import TOP, SamplesConfig, Selection, select
from train.samples.token_text import pieces

F, T = 48, 32
MASK = 2**64 - 1
FEW = SamplesConfig(rows=10**6, top=3, bins=2, per_bin=2, max_stratum_share=0.6, context=12)
WEIGHTS = np.array([0.0, 1.0, 2.0, 3.0])


def make_model(d_in: int, d_out: int, mean: np.ndarray) -> Transcoder:
    activation = BatchTopK(k=4)
    config = TranscoderConfig(d_sae=F).resolve(d_in, activation)
    shift = Normalisation(torch.from_numpy(mean).float(), 2.0, torch.zeros(d_out), 1.0)
    model = Transcoder(d_in, d_out, config, activation, shift)
    model.initialise(3)
    with torch.no_grad():
        model.W_enc.copy_(torch.randn(d_in, F, generator=torch.Generator().manual_seed(5)) / 4)
        model.b_enc[7] = -1e6  # never fires
        model.b_enc[11] = -4.0  # seldom
    model.kernels = "compiled"
    return model


class Reference:
    """Every token's latents in float64, a dictionary at a time."""

    def __init__(self, made: SyntheticStore, model: Transcoder, threshold: float, sequences: int, side: str) -> None:
        first = made.record.request.held_out_blocks * made.record.request.block_sequences
        self.first, self.tokens = first, made.arrays["tokens"][first : first + sequences]
        self.documents = made.arrays["documents"][first : first + sequences]
        self.strata = [s.name for s in made.record.plan.stored_strata]
        self.values: dict[tuple[int, int], np.ndarray] = {}  # latents [F] by (sequence, offset)
        self.stratum: dict[tuple[int, int], str] = {}
        W, b = model.W_enc.detach().double().numpy(), model.b_enc.detach().double().numpy()
        mean, scale = model.source_mean.double().numpy(), float(model.source_scale)
        for name in self.strata:
            rows = made.values(f"strata/{name}/{side}").astype(np.float64)
            marks = (made.arrays[f"strata/{name}/{mark}"] for mark in ("sequence", "offset"))
            for row, sequence, offset in zip(rows, *marks, strict=True):
                if first <= sequence < first + sequences:
                    pre_acts = (row - mean) / scale @ W + b
                    place = int(sequence) - first, int(offset)
                    self.values[place] = np.where(pre_acts > threshold, pre_acts, 0.0)
                    self.stratum[place] = name

    def windows(self, latent: int) -> list[tuple[float, int, int]]:
        """(value, sequence, offset) of every sequence's peak, by falling value; position 0 once per token."""
        best: dict[int, tuple[float, int, int]] = {}
        seen: set[int] = set()
        for sequence, offset in sorted(self.values):
            if offset == 0:
                if (token := int(self.tokens[sequence, 0])) in seen:
                    continue
                seen.add(token)
            value = self.values[sequence, offset][latent]
            if value > 0 and value > best.get(sequence, (0.0,))[0]:
                best[sequence] = value, sequence, offset
        return sorted(best.values(), key=lambda peak: (-peak[0], peak[1], peak[2]))

    def take(self, preferred: list, wanted: int, share: float) -> list:
        most, counts = int(np.ceil(share * wanted - 1e-9)), Counter[Any]()
        taken, passed = list[Any](), list[Any]()
        for peak in preferred:
            stratum = self.stratum[peak[1:]]
            (taken if counts[stratum] < most and len(taken) < wanted else passed).append(peak)
            counts[stratum] += taken[-1:] == [peak]
        taken += passed[: wanted - len(taken)]
        return sorted(taken, key=lambda peak: (-peak[0], peak[1], peak[2]))

    def select(self, latent: int, config: SamplesConfig, seed: int) -> dict[tuple[str, int | None], list]:
        """The samples of one latent by (kind, bin)."""
        windows = self.windows(latent)
        found: dict[tuple[str, int | None], list] = {}
        found["top", None] = self.take(windows, config.top, config.max_stratum_share)
        rest = [peak for peak in windows if peak not in found["top", None]][::-1]
        key = int(hash_integers(np.array([latent]), "samples", seed)[0])
        for b in range(config.bins):
            part = rest[len(rest) * b // config.bins : len(rest) * (b + 1) // config.bins]
            drawn = sorted(part, key=lambda peak: slow_mix((peak[1] * T + peak[2] + key) & MASK))
            found["quantile", b] = self.take(drawn, config.per_bin, config.max_stratum_share)
        return found

    def activation(self, latent: int, sequence: int, offset: int) -> float | None:
        if (sequence, offset) not in self.values and offset == 0:
            same = [p for p in self.values if p[1] == 0 and self.tokens[p] == self.tokens[sequence, 0]]
            return float(self.values[same[0]][latent]) if same else None
        return float(self.values[sequence, offset][latent]) if (sequence, offset) in self.values else None


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def encoded(
    store: Store, model: Transcoder, threshold: float = 0.5, rows: int = 10**6, source: Side = "source"
) -> Activations:
    return encode(model, StoreRows(store, 37, source), store.record.training_blocks, torch.full((F,), threshold), rows)


def assert_samples(table, reference: Reference, config: SamplesConfig, seed: int) -> None:
    """The table's rows are the reference's, every column."""
    found = defaultdict(list)
    for row in table.to_pylist():
        found[row["latent"], row["kind"], row["bin"]].append(row)
    nulls = restored = 0
    for latent in range(F):
        for (kind, b), peaks in reference.select(latent, config, seed).items():
            rows = found.pop((latent, kind, b), [])
            assert [(r["sequence"] - reference.first, r["offset"]) for r in rows] == [peak[1:] for peak in peaks]
            assert [r["rank"] for r in rows] == list(range(len(peaks)))
            for row, (value, sequence, offset) in zip(rows, peaks, strict=True):
                assert row["activation"] == pytest.approx(value, rel=1e-5)
                assert row["stratum"] == reference.stratum[sequence, offset] and row["position"] == offset
                assert row["document"] == reference.documents[sequence, offset]
                start = offset - row["peak"]
                assert start == min(max(offset + 1 + config.context // 4 - config.context, 0), T - config.context)
                assert row["tokens"] == reference.tokens[sequence, start : start + config.context].tolist()
                expected = [reference.activation(latent, sequence, start + c) for c in range(config.context)]
                assert [a is None for a in row["activations"]] == [a is None for a in expected]
                known = [(a, b) for a, b in zip(row["activations"], expected, strict=True) if b is not None]
                assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=1e-5, abs=1e-6)
                nulls += len(expected) - len(known)
                restored += start == 0 and (sequence, 0) not in reference.values and expected[0] is not None
    assert not found
    reference.nulls, reference.restored = nulls, restored  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [0.6, 0.3, 1.0])
@pytest.mark.parametrize("keep", [{}, {0: 0.25, 4: 0.3, 16: 0.6}], ids=["all", "kept"])
@pytest.mark.parametrize("source", ["source", "target"])
def test_samples_are_those_of_the_reference(tmp_path: Path, source: Side, keep: dict, share: float) -> None:
    made = make_store(tmp_path / "store", keep=keep, tokenizer=True)
    store = Store.open(made.path)
    width = store.record.d_in if source == "source" else store.record.d_out
    model = make_model(width, store.record.d_out, store.statistics["overall"][source].mean)
    config = FEW.model_copy(update={"max_stratum_share": share})
    found = encoded(store, model, source=source)
    table = contexts_table(found, select(found, config, 9), config.context, store.tokenizer / "tokenizer.json")
    reference = Reference(made, model, 0.5, 48, source)
    assert_samples(table, reference, config, 9)
    assert bool(reference.nulls) == bool(keep) and bool(reference.restored) == bool(keep)  # type: ignore[attr-defined]
    words = [f" word{token}" if token else " <bos>" for token in table["tokens"].combine_chunks().flatten().to_pylist()]
    assert table["text"].combine_chunks().flatten().to_pylist() == words


def test_the_table_of_latents_is_that_of_the_reference(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", keep={0: 0.25, 4: 0.3})
    store = Store.open(made.path)
    model = make_model(16, 24, store.statistics["overall"]["source"].mean)
    found = encoded(store, model)
    chosen = select(found, FEW, 0)
    rows = latents_table(found, chosen, np.arange(F), WEIGHTS).to_pylist()
    reference = Reference(made, model, 0.5, 48, "source")
    names, looked_at = reference.strata, Counter(reference.stratum.values())
    assert found.rows.tolist() == [looked_at[name] for name in names]
    for latent, row in enumerate(rows):
        active = {p: v[latent] for p, v in reference.values.items() if v[latent] > 0}
        weight = {p: WEIGHTS[names.index(reference.stratum[p])] for p in active}
        total = sum(WEIGHTS[names.index(name)] * count for name, count in looked_at.items())
        assert (row["latent"], row["prefix"], row["rows"]) == (latent, latent, len(active))
        assert row["sequences"] == len({sequence for sequence, _ in active})
        assert row["density"] == pytest.approx(sum(weight.values()) / total)
        assert row["contexts"] == sum(map(len, reference.select(latent, FEW, 0).values()))
        for name in names:
            count = sum(reference.stratum[p] == name for p in active)
            assert row[f"density_{name}"] == pytest.approx(count / looked_at[name])
        if active:
            assert row["max"] == pytest.approx(max(active.values()), rel=1e-5)
        if sum(weight.values()):
            mean = sum(weight[p] * v for p, v in active.items()) / sum(weight.values())
            assert row["mean"] == pytest.approx(mean, rel=1e-5)
        windows = reference.windows(latent)
        rest = [p for p in windows if p not in reference.take(windows, FEW.top, FEW.max_stratum_share)][::-1]
        edges = [rest[0][0], rest[len(rest) // 2][0], rest[-1][0]] if rest else None
        assert row["bin_edges"] == (edges if edges is None else pytest.approx(edges, rel=1e-5))


def test_a_latent_that_never_fires_has_no_context(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store").path)
    found = encoded(store, make_model(16, 24, np.zeros(16)))
    chosen = select(found, FEW, 0)
    assert 7 not in chosen.latents and len(np.unique(chosen.latents)) > 40
    row = latents_table(found, chosen, np.arange(F), WEIGHTS).to_pylist()[7]
    assert (row["rows"], row["contexts"], row["density"]) == (0, 0, 0)
    assert row["max"] is row["mean"] is row["bin_edges"] is None


@pytest.mark.parametrize(
    ("rows", "sequences"), [(1, 1), (32 * 3, 3), (32 * 16 - 1, 15), (32 * 16 + 5, 16), (32 * 20 + 5, 20), (10**9, 48)]
)
def test_whole_sequences_are_looked_at_as_many_as_the_rows_allow(tmp_path: Path, rows: int, sequences: int) -> None:
    made = make_store(tmp_path / "store")
    store = Store.open(made.path)
    model = make_model(16, 24, store.statistics["overall"]["source"].mean)
    found = encoded(store, model, rows=rows)
    assert found.tokens.shape == (sequences, T) and found.rows.sum() == sequences * T
    table = contexts_table(found, select(found, FEW, 0), FEW.context, Path("none"))
    assert_samples(table, Reference(made, model, 0.5, sequences, "source"), FEW, 0)
    if sequences == 3:  # fewer than wanted: every window in which a latent fires is shown, once
        every = encoded(store, model, rows=rows, threshold=-100.0)
        counts = Counter(select(every, FEW, 0).latents.tolist())
        assert all(counts[latent] == 3 for latent in range(F) if latent != 7)


def test_where_very_many_latents_are_active_fewer_sequences_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(make_store(tmp_path / "store").path)
    model = make_model(16, 24, store.statistics["overall"]["source"].mean)
    whole = encoded(store, model)
    monkeypatch.setattr(encoding, "MOST_PAIRS", len(whole.places) // 2)
    half = encoded(store, model)
    sequences, pairs = len(half.tokens), len(half.places)
    assert 16 < sequences < 32 and len(whole.places) // 4 < pairs <= len(whole.places) // 2
    same = encoded(store, model, rows=sequences * T)
    for name in ("tokens", "stratum", "starts", "places"):
        np.testing.assert_array_equal(getattr(half, name), getattr(same, name))
    np.testing.assert_allclose(half.values, same.values, rtol=1e-6)  # of products of other shapes
    monkeypatch.setattr(encoding, "MOST_PAIRS", 1)
    assert len(encoded(store, model).tokens) == 1
    monkeypatch.setattr(encoding, "MOST_PLACES", 5 * T)
    monkeypatch.setattr(encoding, "MOST_PAIRS", 10**9)
    assert len(encoded(store, model).tokens) == 5


def test_a_row_that_the_store_repeats_counts_once(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store")
    store = Store.open(made.path)
    model = make_model(16, 24, store.statistics["overall"]["source"].mean)
    folder, name = made.path / "activations.zarr/strata/016-032", "strata/016-032"
    for array in ("source", "target", "position", "sequence", "offset"):
        (file,) = (path for path in (folder / array / "c").glob("2*/**/*" if array in ("source", "target") else "2*"))
        data, size = bytearray(file.read_bytes()), made.arrays[f"{name}/{array}"][0].nbytes
        data[size : 2 * size] = data[:size]  # the second row of the first training block is the first again
        file.write_bytes(data)
    first, second = ([int(made.arrays[f"{name}/{n}"][512 + i]) for n in ("sequence", "offset")] for i in (0, 1))
    found = encoded(store, model)
    assert found.rows.tolist() == [48, 144, 576, 767]
    lost = (second[0] - found.first) * T + second[1]
    assert (
        found.stratum[lost] == context_loops.NOT_STORED
        and np.count_nonzero(found.stratum == context_loops.NOT_STORED) == 1
    )
    assert np.count_nonzero(found.places == (first[0] - found.first) * T + first[1]) > 3
    for latent in range(F):
        places = found.places[found.starts[latent] : found.starts[latent + 1]]
        assert (np.diff(places) > 0).all()


def planted(values: dict[tuple[int, int], float], sequences: int = 40, apart: bool = False, **given) -> Activations:
    """One latent with `values` at (sequence, offset); positions 0 | 1-15 | 16-31, all of which are stored."""
    tokens = np.tile(np.arange(T, dtype=np.int32), (sequences, 1))
    places = sorted(values)
    return replace(
        Activations(
            first=100,
            tokens=tokens,
            documents=np.arange(sequences, dtype=np.int32).repeat(T).reshape(sequences, T),
            apart=apart,
            strata=("000-001", "001-016", "016-032"),
            stratum=np.tile(np.repeat(np.arange(3, dtype=np.uint8), [1, 15, 16]), sequences),
            starts=np.array([0, len(places)]),
            places=np.array([s * T + t for s, t in places], np.int32),
            values=np.array([values[place] for place in places], np.float32),
        ),
        **given,
    )


def chosen_places(found: Activations, chosen: Selection, b: int | None = TOP) -> list[tuple[int, int]]:
    of = chosen.pairs if b is None else chosen.pairs[chosen.bins == b]
    return [divmod(int(place), T) for place in found.places[of]]


def test_adjacent_tokens_of_one_sequence_do_not_fill_the_list() -> None:
    values = {(3, t): 50.0 + t for t in range(5, 30)} | {(s, 7 + s % 9): 1.0 + s / 100 for s in range(10, 30)}
    found = planted(values)
    chosen = select(found, SamplesConfig(max_stratum_share=1.0), 0)
    assert chosen_places(found, chosen) == [(3, 29), *[(s, 7 + s % 9) for s in range(29, 20, -1)]]
    sequences = [s for s, _ in chosen_places(found, chosen, None)]
    assert len(sequences) == len(set(sequences)) == 21


def test_position_0_does_not_fill_the_list() -> None:
    """Every sequence has its largest value there, one and the same."""
    values = {(s, 0): 80.0 for s in range(40)} | {(s, 20): 1.0 + s for s in range(40)}
    found = planted(values)
    places = chosen_places(found, select(found, SamplesConfig(), 0), None)
    assert places[0] == (0, 0) and [t for _, t in places].count(0) == 1 and len(places) == 25
    assert places[1:10] == [(s, 20) for s in range(39, 30, -1)]


def test_windows_that_start_with_several_tokens_show_each_once() -> None:
    tokens = np.tile(np.arange(T, dtype=np.int32), (40, 1))
    tokens[:, 0] = np.arange(40) % 3
    found = planted({(s, 0): 80.0 + s % 3 for s in range(40)}, tokens=tokens)
    assert sorted(chosen_places(found, select(found, SamplesConfig(), 0), None)) == [(0, 0), (1, 0), (2, 0)]


def test_no_stratum_fills_the_list_unless_it_has_to() -> None:
    early, late = {(s, 5): 50.0 + s for s in range(20)}, {(s, 20): 1.0 + s for s in range(20, 40)}
    found = planted(early | late)
    config = SamplesConfig(bins=0)
    places = chosen_places(found, select(found, config, 0))
    assert places == [*[(s, 5) for s in range(19, 13, -1)], *[(s, 20) for s in range(39, 35, -1)]]
    few = planted(early | {(30, 20): 1.0})
    assert chosen_places(few, select(few, config, 0)) == [*[(s, 5) for s in range(19, 10, -1)], (30, 20)]
    alone = planted(early)
    assert chosen_places(alone, select(alone, config, 0)) == [(s, 5) for s in range(19, 9, -1)]


def test_bins_hold_as_many_sequences_each_and_the_seed_decides_which_are_shown() -> None:
    found = planted({(s, 20): 1.0 + s for s in range(40)})
    config = SamplesConfig(max_stratum_share=1.0)
    drawn = [[chosen_places(found, select(found, config, seed), b) for b in range(5)] for seed in (0, 0, 1)]
    for b, places in enumerate(drawn[0]):  # 30 sequences are left, six in a bin
        assert len(places) == 3 and {s // 6 for s, _ in places} == {b} and places == sorted(places, reverse=True)
    assert drawn[0] == drawn[1] != drawn[2]
    assert select(found, config, 0).edges.tolist() == [[1.0, 7.0, 13.0, 19.0, 25.0, 30.0]]


def test_the_draw_from_a_bin_is_even() -> None:
    config, counts = SamplesConfig(top=1, bins=1, per_bin=1, max_stratum_share=1.0), Counter[Any]()
    found = planted({(s, 20): 1.0 + s for s in range(11)})
    for seed in range(1000):
        counts.update(chosen_places(found, select(found, config, seed), 0))
    assert len(counts) == 10 and all(60 < count < 140 for count in counts.values())


def test_contexts_of_documents_apart_end_where_the_document_does() -> None:
    documents = np.repeat([[0, 1, 2]], [10, 15, 7], axis=1).repeat(4, axis=0).astype(np.int32)
    tokens = np.tile(np.arange(T, dtype=np.int32), (4, 1))
    tokens[:, [0, 10, 25]] = 99
    stratum = np.zeros(4 * T, np.uint8)
    stratum[[T, T + 10, T + 26]] = context_loops.NOT_STORED  # two starts of documents, and another token
    found = planted({(0, 0): 5.0, (1, 12): 9.0, (1, 27): 1.0, (2, 25): 5.0}, 4, True,
                    documents=documents, tokens=tokens, stratum=stratum)  # fmt: skip
    assert found.known[0].tolist() == [99] and found.known[1].tolist() == [0]
    table = contexts_table(found, select(found, SamplesConfig(), 0), 32, Path("none"))
    rows = {(row["sequence"], row["offset"]): row for row in table.to_pylist()}
    assert set(rows) == {(101, 12), (100, 0)}  # one of a sequence; of the starts, the first alone
    row = rows[101, 12]
    assert row["tokens"] == [99, *range(11, 25)] and (row["peak"], row["position"], row["document"]) == (2, 2, 1)
    assert row["activations"] == [5.0, 0.0, 9.0, *[0.0] * 12] and row["text"] is not None
    assert rows[100, 0]["tokens"] == [99, *range(1, 10)]
    joined = contexts_table(replace(found, apart=False), select(found, SamplesConfig(), 0), 32, Path("none"))
    row = next(row for row in joined.to_pylist() if row["offset"] == 12)
    assert len(row["tokens"]) == 32 and (row["peak"], row["position"]) == (12, 12)
    assert row["activations"][0] == 5.0 and row["activations"][10] is None and row["activations"][26] is None


def test_a_harvest_of_documents_apart_is_sampled_by_its_positions(small, tmp_path: Path) -> None:
    from tests.llms import command as harvest

    path = harvest(*small(tmp_path, "--set", "windows.documents=apart")).store
    store = Store.open(path)
    model = make_model(store.record.d_in, store.record.d_out, store.statistics["overall"]["source"].mean)
    found = encoded(store, model, threshold=0.2)
    table = contexts_table(found, select(found, FEW, 0), FEW.context, store.tokenizer / "tokenizer.json")
    rows = table.to_pylist()
    stored = {
        (int(s), int(t)): int(p)
        for stratum in store.strata.values()
        for s, t, p in zip(*(_all(store, getattr(stratum, n)) for n in ("sequence", "offset", "position")), strict=True)
    }
    assert len(rows) > 200 and sum(row["position"] < row["offset"] for row in rows) > 50
    for row in rows:
        assert row["position"] == stored[row["sequence"], row["offset"]]
        start = row["offset"] - row["peak"]
        documents = found.documents[row["sequence"] - found.first, start : start + len(row["tokens"])]
        assert set(documents.tolist()) == {row["document"]} and len(row["text"]) == len(row["tokens"])
        for c, activation in enumerate(row["activations"]):
            first = row["position"] - row["peak"] + c == 0
            assert (activation is None) == ((row["sequence"], start + c) not in stored and not first)
    at_0 = [row for row in rows if row["position"] == 0]
    assert len({(row["latent"], row["tokens"][row["peak"]]) for row in at_0}) == len(at_0)


def _all(store: Store, array) -> np.ndarray:
    out = np.empty(array.rows, array.spec.dtype)
    array.read(0, array.rows, out)
    return out


def byte_fallback(decoder) -> Tokenizer:
    vocabulary = ["<unk>", "<0x41>", "<0xE2>", "▁", "▁the", "a"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(vocabulary)}, [], byte_fallback=True))
    made.decoder = decoder
    return made


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    "decoder",
    [decoders.Sequence(LLAMA), decoders.Sequence(LLAMA[:3]), decoders.Metaspace()],
    ids=["llama", "gemma", "t5"],
)
def test_pieces_keep_their_spaces_and_bytes_do_not_crash(tmp_path: Path, decoder) -> None:
    byte_fallback(decoder).save(str(tmp_path / "tokenizer.json"))
    found = pieces(tmp_path / "tokenizer.json", range(7))
    assert found[3:] == [" ", " the", "a", "<6>"] and found[0] == "<unk>"
    if not isinstance(decoder, decoders.Metaspace):
        assert found[1:3] == ["A", "�"]


def test_pieces_of_the_embedded_models_tokenizer_join_to_the_text() -> None:
    file = Path("harvest/embedded/model/tokenizer.json")
    text = "def naïve(self):\n\treturn  '→'\n"
    tokens = Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids
    found = pieces(file, tokens)
    assert len(found) == len(tokens) and "�" in "".join(found)
    ascii_only = text.replace("ï", "i").replace("→", ">")
    tokens = Tokenizer.from_file(str(file)).encode(ascii_only, add_special_tokens=False).ids
    assert "".join(pieces(file, tokens)) == ascii_only


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptData, match=r"tokenizer\.json: not a readable tokenizer"):
        pieces(tmp_path / "tokenizer.json", [1])


def test_a_pass_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    store = Store.open(make_store(tmp_path / "store").path)
    model, blocks = make_model(16, 24, np.zeros(16)), store.record.training_blocks
    with pytest.raises(Stopped, match="stopped while sampling"):
        encode(model, StoreRows(store, 16), blocks, torch.zeros(F), 100, stop=[1])
