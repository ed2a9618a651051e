"""Packing against a naive loop over single tokens."""

import numpy as np
import pytest

from harvest.packing import Packed, Quota, TokenStream, pack

PAYLOAD = 7
SEPARATOR = 1


def documents(seed: int, count: int = 60) -> list[np.ndarray]:
    """Documents of 0 to 29 tokens; a token's value is unique, so that its document can be told."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, count)
    ends = np.cumsum(lengths) + 10
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]


def naive(docs: list[np.ndarray], quota: Quota, separator: int | None) -> tuple[list[list[int]], list[list[int]]]:
    held_out, training, window = [], [], []
    held = quota.held_out > 0
    for doc in docs:
        for token in [*doc.tolist(), *([separator] if separator is not None and len(doc) else [])]:
            window.append(token)
            if len(window) < PAYLOAD:
                continue
            (held_out if held else training).append(window)
            window = []
            if held and len(held_out) == quota.held_out:
                held = False
                break
    return held_out, training[quota.skipped :][: quota.wanted]


def run(docs: list[np.ndarray], quota: Quota, separator: int | None = SEPARATOR) -> tuple[Packed, list[list[int]]]:
    kept: list[list[int]] = []
    packed = pack(TokenStream(docs, separator, PAYLOAD), PAYLOAD, quota, lambda part: kept.extend(part.tolist()))
    return packed, kept


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("separator", [SEPARATOR, None])
def test_windows_equal_those_of_a_naive_loop(seed: int, separator: int | None) -> None:
    docs = documents(seed)
    quota = Quota(held_out=seed % 5, skipped=0, wanted=20 if seed % 2 else 10_000)
    packed, kept = run(docs, quota, separator)
    held_out, training = naive(docs, quota, separator)
    assert packed.held_out.tolist() == held_out
    assert kept == training
    assert packed.windows == len(training)


@pytest.mark.parametrize("seed", range(6))
def test_counts_add_up_and_tell_where_tokens_went(seed: int) -> None:
    docs = documents(seed)
    packed, _ = run(docs, Quota(held_out=4, skipped=0, wanted=10_000))
    counts = packed.counts(packed.windows // 8 * 8, PAYLOAD)
    full = [doc for doc in docs if len(doc)]
    assert counts.documents == len(full)
    assert counts.empty_documents == len(docs) - len(full)
    assert counts.tokens_read == sum(len(doc) + 1 for doc in full)
    assert counts.tokens_held_out == 4 * PAYLOAD
    assert counts.tokens_kept == packed.windows // 8 * 8 * PAYLOAD
    assert counts.tokens_read == counts.tokens_kept + counts.tokens_held_out + counts.tokens_left_over


@pytest.mark.parametrize("seed", range(6))
def test_no_document_is_on_both_sides(seed: int) -> None:
    docs = documents(seed)
    owner = {int(token): number for number, doc in enumerate(docs) for token in doc}
    packed, kept = run(docs, Quota(held_out=6, skipped=0, wanted=10_000))
    held_out = {owner[token] for token in packed.held_out.ravel().tolist() if token in owner}
    training = {owner[token] for window in kept for token in window if token in owner}
    assert held_out
    assert not held_out & training
    assert packed.held_out_documents == len(held_out)


def test_reads_no_more_documents_than_needed() -> None:
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield np.full(PAYLOAD - 1, 9, np.int32)

    packed = pack(TokenStream(stream(), SEPARATOR, PAYLOAD), PAYLOAD, Quota(held_out=2, skipped=0, wanted=3), len)
    assert len(read) == 5
    assert packed.documents == 5


@pytest.mark.parametrize("seed", range(6))
def test_segments_continue_one_another(seed: int) -> None:
    docs = documents(seed)
    _, whole = run(docs, Quota(held_out=3, skipped=0, wanted=30))
    first, a = run(docs, Quota(held_out=3, skipped=0, wanted=12))
    second, b = run(docs, Quota(held_out=3, skipped=12, wanted=18))
    assert a + b == whole
    assert second.held_out.size == 0 and second.held_out_documents == 0
    counts = second.counts(18, PAYLOAD)
    assert counts.tokens_read == counts.tokens_kept + counts.tokens_left_over
    # What the first segment left over of its last document is the second one's start.
    left = first.counts(12, PAYLOAD).tokens_left_over
    naive_drop = first.tokens - 15 * PAYLOAD
    assert left == naive_drop


def test_a_corpus_that_is_too_short_gives_what_there_is() -> None:
    packed, kept = run([np.arange(10, 20, dtype=np.int32)], Quota(held_out=5, skipped=0, wanted=5))
    assert packed.held_out.tolist() == [list(range(10, 17))]
    assert packed.windows == 0 and kept == []
