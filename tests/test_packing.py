"""Packing against a naive loop over single tokens."""

import numpy as np
import pytest

from harvest.text.packing import Encoded, Packed, Quota, TokenStream, Windows, model_positions, pack
from shared.store.layout import Documents

CONTEXT = 8
BOS, SEPARATOR = 2, 1
KINDS = ("joined", "apart")


def documents(seed: int, count: int = 60) -> list[np.ndarray]:
    """Documents of 0 to 29 tokens; a token's value is unique, so that its document can be told."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, count)
    ends = np.cumsum(lengths) + 10
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]


def naive(docs: list[np.ndarray], quota: Quota, kind: str, bos: int | None, separator: int | None) -> tuple[list, list]:
    """Windows as lists of (token, document), one token at a time."""
    held_out: list = []
    training: list = []
    window: list = []
    held = quota.held_out > 0
    for number, doc in enumerate(doc for doc in docs if len(doc)):
        tokens = [*doc.tolist(), *([] if separator is None else [separator])]
        fresh = True
        while tokens:
            if bos is not None and (not window or (fresh and kind == "apart")):
                window.append((bos, number))
            else:
                window.append((tokens.pop(0), number))
            fresh = False
            if len(window) == CONTEXT:
                (held_out if held else training).append(window)
                window, fresh = [], True
                if held and len(held_out) == quota.held_out:
                    held = False
                    break
    return held_out, training[quota.skipped :][: quota.wanted]


def run(
    docs: list[np.ndarray],
    quota: Quota,
    kind: Documents = "joined",
    bos: int | None = BOS,
    separator: int | None = SEPARATOR,
) -> tuple[Packed, list]:
    kept: list = []
    stream = TokenStream(map(Encoded, docs), bos=bos, separator=separator, context=CONTEXT, kind=kind)
    return pack(stream, CONTEXT, quota, lambda part: kept.extend(pairs(part))), kept


def pairs(windows: Windows) -> list:
    return np.stack(windows, axis=-1).tolist()


def as_lists(windows: list) -> list:
    return [[list(pair) for pair in window] for window in windows]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("separator", [SEPARATOR, None])
@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_those_of_a_naive_loop(
    seed: int, separator: int | None, bos: int | None, kind: Documents
) -> None:
    docs = documents(seed)
    quota = Quota(held_out=seed % 5, skipped=0, wanted=20 if seed % 2 else 10_000)
    packed, kept = run(docs, quota, kind, bos, separator)
    held_out, training = naive(docs, quota, kind, bos, separator)
    assert pairs(packed.held_out) == as_lists(held_out)
    assert kept == as_lists(training)
    assert packed.windows == len(training) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_the_model_counts(kind: Documents) -> None:
    _, kept = run(documents(0), Quota(held_out=2, skipped=0, wanted=50), kind)
    windows = Windows(*np.moveaxis(np.array(kept, np.int32), -1, 0))
    for found, window in zip(model_positions(windows, kind), kept, strict=True):
        position, expected, before = 0, [], None
        for _, document in window:
            position = 0 if kind == "apart" and document != before else position
            expected.append(position)
            position, before = position + 1, document
        assert found.tolist() == expected
    if kind == "apart":
        assert ((windows.tokens == BOS) == (model_positions(windows, kind) == 0)).all()


@pytest.mark.fault(39)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_read_is_somewhere(seed: int, kind: Documents) -> None:
    docs = documents(seed)
    packed, kept = run(docs, Quota(held_out=4, skipped=0, wanted=10_000), kind)
    full = [doc for doc in docs if len(doc)]
    assert packed.documents == len(full)
    assert packed.empty_documents == len(docs) - len(full)
    assert packed.tokens == sum(len(doc) + 1 for doc in full)
    inside = sum(token != BOS for window in [*kept, *pairs(packed.held_out)] for token, _ in window)
    counts = packed.counts(inside - 10, 10)
    assert counts.tokens_read == counts.tokens_kept + counts.tokens_held_out + counts.tokens_left_over


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_no_document_is_on_both_sides(seed: int, kind: Documents) -> None:
    packed, kept = run(documents(seed), Quota(held_out=6, skipped=0, wanted=10_000), kind)
    held_out = set(packed.held_out.documents.ravel().tolist())
    training = {document for window in kept for _, document in window}
    assert held_out and training
    assert not held_out & training
    assert packed.held_out_documents == len(held_out)


def test_reads_no_more_documents_than_needed() -> None:
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield np.full(CONTEXT - 2, 9, np.int32)

    packed, _ = run(stream(), Quota(held_out=2, skipped=0, wanted=3))
    assert len(read) == 5
    assert packed.documents == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_segments_continue_one_another(seed: int, kind: Documents) -> None:
    docs = documents(seed)
    _, whole = run(docs, Quota(held_out=3, skipped=0, wanted=30), kind)
    first, a = run(docs, Quota(held_out=3, skipped=0, wanted=12), kind)
    second, b = run(docs, Quota(held_out=3, skipped=12, wanted=18), kind)
    assert a + b == whole
    assert second.held_out.tokens.size == 0 and second.held_out_documents == 0
    # What the first segment read of its last document and did not use is the second one's start.
    used = sum(token != BOS for window in b for token, _ in window)
    left = first.tokens - sum(token != BOS for window in [*a, *pairs(first.held_out)] for token, _ in window)
    assert second.tokens >= used and left >= 0


def test_what_is_left_out_of_rows_is_counted_in_its_segment() -> None:
    row = np.full(CONTEXT - 2, 9, np.int32)
    docs = [
        Encoded(row, {"padding_tokens": 3}),
        Encoded(row[:0], {"refused_rows": 1}),
        Encoded(row[:0]),
        Encoded(row, {"padding_tokens": 4, "replaced_characters": 2}),
        Encoded(row, {"replaced_characters": 8}),
    ]

    def packed(skipped: int, wanted: int) -> Packed:
        stream = TokenStream(docs, bos=BOS, separator=SEPARATOR, context=CONTEXT, kind="joined")
        return pack(stream, CONTEXT, Quota(held_out=0, skipped=skipped, wanted=wanted), lambda part: None)

    first, second, both = packed(0, 1), packed(1, 2), packed(0, 3)
    assert first.left_out == {"padding_tokens": 3}
    assert second.left_out == {"padding_tokens": 4, "replaced_characters": 10, "refused_rows": 1}
    assert both.left_out == {"padding_tokens": 7, "replaced_characters": 10, "refused_rows": 1}
    assert (both.documents, both.empty_documents) == (3, 1)
    record = both.counts(10, 0).model_dump(mode="json")
    assert record["padding_tokens"] == 7 and record["refused_rows"] == 1
    assert "padding_tokens" not in packed(0, 0).counts(0, 0).model_dump(mode="json")  # as a version before wrote it


def test_a_corpus_that_is_too_short_gives_what_there_is() -> None:
    packed, kept = run([np.arange(10, 20, dtype=np.int32)], Quota(held_out=5, skipped=0, wanted=5))
    assert packed.held_out.tokens.tolist() == [[BOS, *range(10, 17)]]
    assert packed.windows == 0 and kept == []
