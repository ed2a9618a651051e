"""Permutations and hashes that are a pure function of a key.

The streams of numpy's and torch's generators are not promised to stay the same from version to version; a store
must be repairable, and a batch reproducible, in years. So the bits come from the splitmix64 finaliser (Steele, Lea
and Flood 2014, constants of Stafford's mix 13), keyed through BLAKE2b.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Key = int | str


def key_bits(*key: Key) -> int:
    """Return 64 bits that stand for `key`; the parts are typed and length-prefixed, so no two keys run together."""
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the splitmix64 finaliser to each value."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_integers(values: NDArray[np.integer], *key: Key) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each value under `key`: two rounds of splitmix64 with the key between them."""
    bits = np.uint64(key_bits(*key))
    x = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix(mix(x + bits) ^ bits)


def permutation(n: int, *key: Key) -> NDArray[np.int64]:
    """Return a permutation of `range(n)` that depends on `n` and `key` alone."""
    return np.argsort(hash_integers(np.arange(n), *key), kind="stable")
