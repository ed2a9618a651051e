"""Reads `unembedding.safetensors` and lists the tokens that directions promote. No torch here."""

import json
import mmap
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import CorruptData, UserError
from shared.store.statistics import decode

_BLOCK_VALUES = 2**24
"""Most values of a block of effects, and of a block of `W_U`: 64 MiB in float32 each."""
_MOST_HEADER_BYTES = 2**20
_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


class TokenEffects(NamedTuple):
    """Tokens of n directions and their logits, each [n, count], the strongest first."""

    promoted: NDArray[np.int64]
    promoted_effects: NDArray[np.float32]
    suppressed: NDArray[np.int64]
    suppressed_effects: NDArray[np.float32]


class Unembedding:
    """`W_U` [vocabulary, d_model], mapped, and the gain [d_model] of the norm before it."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises `UserError` when there is none, and `CorruptData` when it is not one."""
        self._path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            (length,) = struct.unpack_from("<Q", self._map)
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"its header claims {length:,} bytes")
            self._header, self._data = json.loads(self._map[8 : 8 + length]), 8 + length
            self._weight, self._gain = self._tensor("W_U", 2), _float32(self._tensor("final_norm.gain", 1))
        except FileNotFoundError as error:
            raise UserError(f"no unembedding at {path}; harvest with --set store.unembedding=true") from error
        except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
            raise CorruptData(f"{path}: not a readable unembedding ({error}); run the same harvest again") from error
        if self._gain.shape != self._weight.shape[1:]:
            raise CorruptData(f"{path}: final_norm.gain is {self._gain.shape}, and W_U is {self._weight.shape}")

    @property
    def final_norm(self) -> tuple[str, float]:
        """What the model's norms are, `rms` or `layer`, and what they add to the mean square. Raises `CorruptData`."""
        try:
            told = json.loads(self._header["__metadata__"]["logits"])
            kind, eps = str(told["norm"]), float(told["eps"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptData(f"{self._path}: does not say what the final norm is ({error!r})") from error
        if kind not in ("rms", "layer") or not 0 < eps <= 1:
            raise CorruptData(f"{self._path}: a final norm of kind {kind[:20]!r} with eps {eps:g}")
        return kind, eps

    def effects(
        self, directions: NDArray[np.float32], count: int, tokens: Collection[int] | None = None
    ) -> TokenEffects:
        """Find the `count` tokens that each row of `directions` [n, d_model] promotes and suppresses most.

        The effect is `(w * gain) @ W_U.T` less its mean over the vocabulary: what adding `w` to the residual stream
        does to the logits directly, up to the norm's scale and before any softcap. The vocabulary is `tokens`, or else
        all rows: many models have rows beyond those that the tokenizer knows. Raises `UserError` when the directions
        are not as wide as the residual stream.
        """
        rows_known = self._known(tokens)
        width, vocabulary = self._weight.shape[1], int(rows_known.sum())
        if directions.ndim != 2 or directions.shape[1] != width:
            raise UserError(
                f"directions are {list(directions.shape)}, and {self._path} unembeds {width} values; the tokens that a "
                "latent promotes are known only where the target is part of the residual stream"
            )
        scaled: NDArray[Any] = directions * self._gain
        count = min(count, vocabulary)
        promoted, suppressed = _Largest(len(scaled), count), _Largest(len(scaled), count)
        step, total = max(1, _BLOCK_VALUES // width), np.zeros(width)
        rows = max(1, _BLOCK_VALUES // step)
        # The outer loop: making `W_U` float32 costs as much as a product.
        for first in range(0, len(self._weight), step):
            weight, known = _float32(self._weight[first : first + step]), rows_known[first : first + step]
            total += (weight if known.all() else weight[known]).sum(0, dtype=np.float64)
            for low in range(0, len(scaled), rows):
                effects = scaled[low : low + rows] @ weight.T
                promoted.add(np.where(known, effects, -np.inf), low, first)
                suppressed.add(np.where(known, -effects, -np.inf), low, first)
        mean = (scaled @ (total / vocabulary)).astype(np.float32)[:, None]
        return TokenEffects(promoted.columns, promoted.values - mean, suppressed.columns, -suppressed.values - mean)

    def scaled(self, tokens: Collection[int] | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the vocabulary [n], as `effects` takes it, and its rows of `W_U` times the gain [n, d_model]."""
        known = np.flatnonzero(self._known(tokens))
        return known, _float32(self._weight[known]) * self._gain

    def _known(self, tokens: Collection[int] | None) -> NDArray[np.bool_]:
        """Return which rows [vocabulary] are `tokens`; all if none of them is, or none are given."""
        known = np.zeros(len(self._weight), bool)
        known[[token for token in tokens or () if 0 <= token < len(known)]] = True
        return known if known.any() else ~known

    def _tensor(self, name: str, dimensions: int) -> NDArray[Any]:
        told = self._header[name]
        (start, stop), dtype, shape = told["data_offsets"], np.dtype(_DTYPES[told["dtype"]]), tuple(told["shape"])
        if not 0 <= start <= stop <= len(self._map) - self._data or len(shape) != dimensions or min(shape) < 1:
            raise ValueError(f"{name} does not fit into the file")
        flat = np.frombuffer(self._map, dtype, (stop - start) // dtype.itemsize, self._data + start)
        return flat.reshape(shape)


class _Largest:
    """The `count` largest values of each row, the largest first, of a matrix that comes in blocks of columns."""

    def __init__(self, rows: int, count: int) -> None:
        self.values = np.full((rows, count), -np.inf, np.float32)
        self.columns = np.zeros((rows, count), np.int64)

    def add(self, block: NDArray[np.float32], low: int, first: int) -> None:
        """Take in the values of rows from `low` on, at columns from `first` on; of equal ones the first stay."""
        count, part = self.values.shape[1], slice(low, low + len(block))
        if first == 0 and count < block.shape[1]:  # all are above minus infinity
            taken = block >= np.partition(block, -count, axis=1)[:, -count, None]
        else:
            taken = block > self.values[part, -1:]
        rows, columns = np.nonzero(taken)
        every = np.concatenate([np.repeat(np.arange(len(block)), count), rows])
        values = np.concatenate([self.values[part].ravel(), block[rows, columns]])
        columns = np.concatenate([self.columns[part].ravel(), columns + first])
        order = np.lexsort((columns, -values, every))
        starts = np.searchsorted(every[order], np.arange(len(block)))
        kept = order[starts[:, None] + np.arange(count)]
        self.values[part], self.columns[part] = values[kept], columns[kept]


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return values as float32; uint16 are the bits of bfloat16."""
    return decode(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)
