"""Keyed hashes and permutations. Stores on disk depend on these numbers: no change may alter one of them."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from shared.keyed import hash_integers, key_bits, permutation

MASK = 2**64 - 1


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(value: int, bits: int) -> int:
    return slow_mix(slow_mix((value * 0x9E3779B97F4A7C15 + bits) & MASK) ^ bits)


def test_key_bits_are_pinned():
    assert key_bits() == 13020603013274838756
    assert key_bits(0) == 3774308934653935934
    assert key_bits("a", 1) == 3693157706053085907


def test_hashes_are_pinned():
    assert hash_integers(np.arange(4), "golden", 7).tolist() == [
        3810986112552465280,
        6854855394011966537,
        13048852941381876446,
        17297255274466979469,
    ]
    assert hash_integers(np.array([2**63 - 1, -1, 10**12]), "golden").tolist() == [
        8589222457814319185,
        6823869467614541882,
        17175745716921297059,
    ]


def test_permutations_are_pinned():
    assert permutation(12, "golden", 7).tolist() == [0, 10, 1, 11, 5, 6, 9, 7, 2, 8, 3, 4]
    long = permutation(100_000, "golden", 7).astype("<i8").tobytes()
    assert hashlib.sha256(long).hexdigest() == "84930f425601700443071d07faa73b0d62df3c7c6cdf78af7a7b970ca23f96fb"


def test_hash_equals_integer_arithmetic():
    bits = key_bits("reference", 3)
    values = [*range(50), 2**31, 2**40 + 1, 2**63 - 1]
    assert hash_integers(np.array(values), "reference", 3).tolist() == [slow_hash(value, bits) for value in values]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.uint64])
def test_hash_does_not_depend_on_the_type_of_the_values(dtype):
    values = np.array([0, 1, 100])
    assert (hash_integers(values.astype(dtype), "k") == hash_integers(values, "k")).all()


def test_parts_of_a_key_do_not_run_together():
    keys: list[tuple[int | str, ...]] = [
        (),
        (1,),
        ("1",),
        (1, 1),
        (11,),
        ("1", 1),
        (1, "1"),
        ("1", "1"),
        ("11",),
        ("",),
        ("", ""),
        (-1,),
        ("a", "bc"),
    ]
    keys += [("ab", "c"), ("abc",), ("int:1",), (0,), (10**30,), ("ä",)]
    assert len({key_bits(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 4097])
def test_permutation_is_a_bijection(n):
    order = permutation(n, "bijection")
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutation_orders_by_hash():
    hashes = hash_integers(np.arange(1000), "order").tolist()
    assert permutation(1000, "order").tolist() == sorted(range(1000), key=hashes.__getitem__)


def test_different_keys_give_unrelated_permutations():
    n = 10_000
    keys: list[tuple[int | str, ...]] = [("a",), ("b",), (0,), (1,), ("a", 0), (0, "a")]
    orders = [permutation(n, *key) for key in keys]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 10  # one is expected by chance
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_every_item_reaches_every_place_about_equally_often():
    counts = Counter(tuple(permutation(4, "uniform", i).tolist()) for i in range(12_000))
    assert len(counts) == 24
    expected = 12_000 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


def test_every_bit_of_a_hash_is_balanced():
    hashes = hash_integers(np.arange(20_000), "bits")
    shares = [((hashes >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)]
    assert np.abs(np.array(shares) - 0.5).max() < 0.02  # 5.6 standard deviations


def test_one_step_of_the_value_flips_half_the_bits():
    hashes = hash_integers(np.arange(10_001), "avalanche")
    flipped = np.bitwise_count(hashes[1:] ^ hashes[:-1])
    assert abs(flipped.mean() - 32) < 0.3
