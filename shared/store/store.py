"""Opens a finished store: has its records and shard files checked, and maps its rows. No torch here."""

import math
import os
import random
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import json_digest
from shared.errors import CorruptData, UserError
from shared.files.disk_usage import size_of
from shared.files.durable import lock
from shared.files.object_store import is_address, local_folder, place
from shared.files.untrusted import refuse_links
from shared.store.arrays import ArraySpec
from shared.store.checks import (
    belongs,
    check_group,
    check_metadata,
    check_records,
    check_shard,
    check_side_files,
    check_size,
    fault,
    is_packed,
    read_ledger,
    read_packed,
    read_store_record,
    read_vectors,
    record_faults,
    remedy,
)
from shared.store.layout import (
    ARRAYS,
    REQUEST,
    STORE,
    TOKENIZER,
    FileRecord,
    StoreRecord,
    block_bytes,
    documents_spec,
    moments_path,
    record_path,
    statistics_path,
    store_specs,
    stratum_specs,
    tokens_spec,
)
from shared.store.mapped_array import MappedArray, RowArray, Rows
from shared.store.object_rows import ObjectArray, ObjectRows
from shared.store.outliers import Exclusion, longest_norms, store_outliers
from shared.store.packed import LOCAL_BYTES, PACK_AGAIN, LocalFolder, packed_metadata
from shared.store.row_arrays import BLOCK_UNITS, ROW_SCALE, SIDES
from shared.store.scaled_array import ScaledArray
from shared.store.statistics import OUTLIER_RATIO
from shared.store.strata import Stratum

CONSTANT = 100.0
"""Rows whose mean is so many times their deviation are one row for training."""
CHECKED_BYTES = 2**28
"""Of shard files that `Store.check_shards` reads unless it reads all: a tenth of a second from memory."""
_KINDS = ("mean", "variance")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideStatistics:
    """Mean and variance per dimension, float64 [d]."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Where a packed store is decoded while it is read, and what is fetched of one in object storage is kept."""

    folder: Path | None = None
    """The system's folder for temporary files, if not given."""
    bytes: int = LOCAL_BYTES
    """At most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumRows:
    """The rows of one stratum: arrays over the same rows, block after block."""

    stratum: Stratum
    source: RowArray
    target: RowArray
    position: RowArray
    """As the model counted."""
    sequence: RowArray
    """Row of `tokens`."""
    offset: RowArray
    """Column of `tokens`."""


class Store:
    """A finished store, checked and mapped.

    Of one in object storage, `path` is the local folder with its records.
    """

    def __init__(
        self, path: Path, record: StoreRecord, local: Local | None = None, objects: ObjectRows | None = None
    ) -> None:
        """Raise `CorruptData` when the folder holds a link, or, of a packed store, `packed.json` is not its own."""
        refuse_links(path)
        self.place = Path(objects.address) if objects else place(path)
        """Where the store is, as `open` takes it from any current folder."""
        self.objects = objects
        """Where rows are fetched from, of a store in object storage."""
        self.path, self.record, self.request = path, record, record.request
        self.exclusion: Exclusion | None = None
        """Which rows are left out by what reads the store; none: all rows count."""
        self._outliers: dict[tuple[object, ...], dict[str, NDArray[np.int64]]] = {}
        self.packed = read_packed(path, self.arrays(), record.blocks) if is_packed(path) else None
        """The packed shard files, of a packed store."""
        if objects:
            objects.packed = bool(self.packed)
        self._local_given = local or Local()
        self._block_checksums: dict[int, str] = {}
        self._longest: dict[int, dict[str, float]] = {}
        self._sound: set[tuple[object, ...]] = set()
        """What `check_shards` was asked for, and found nothing wrong with."""
        self._checking = Lock()

    @classmethod
    def open(cls, path: Path | str, local: Local | None = None) -> "Store":
        """Open the store at `path`; checks its records, and the size and index of every shard file.

        `path` may be an address of objects, such as `s3://bucket/store`: of their shard files, the sizes are checked.
        `local` says where the rows of a packed store are decoded and those of objects kept; the default `Local()` if
        not given.

        Raises `UserError` when `path` is no finished store of a format this version reads, or `local` is given for one
        that is neither packed nor in object storage, and `CorruptData` when a file is not what the records say. Of
        objects, what `Objects` raises as well.
        """
        path = local_folder(path)
        if is_address(path):
            return cls._of_objects(path, local)
        while True:
            record = read_store_record(path)
            try:
                return cls._checked(path, record, local, None)
            except CorruptData:
                if read_store_record(path) == record:
                    raise  # else it was extended meanwhile, and statistics of the shorter store are gone

    @classmethod
    def _of_objects(cls, path: Path, local: Local | None) -> "Store":
        given = local or Local()
        for last in (False, True):
            try:
                objects = ObjectRows(path, given.folder, given.bytes, again=last)
                with objects.naming():
                    return cls._checked(objects.mirror, read_store_record(objects.mirror), local, objects)
            except (CorruptData, FileNotFoundError):
                if last:
                    raise  # else it may have been extended meanwhile, as above
        raise AssertionError

    @classmethod
    def _checked(cls, path: Path, record: StoreRecord, local: Local | None, objects: ObjectRows | None) -> "Store":
        store = cls(path, record, local, objects)
        if local and not store.packed and not objects:
            raise UserError(f"{path} is not packed, so nothing is decoded; leave out --local-folder and --local-bytes")
        if objects:
            objects.describe_rows(store._shard_record, store.shard_bytes)
        store.check()
        return store

    def check(self) -> None:
        """Raise `CorruptData` unless the records agree, and every file is there with its size, as `open` checks it."""
        path, record, objects, packed = self.path, self.record, self.objects, self.packed
        _ = self.statistics  # at once: an extension that finishes later removes the file
        check_records(path, record)
        for spec in self.arrays():
            for shard in range(record.blocks * spec.shards_per_block):
                name = spec.shard_path(shard)
                if objects:
                    objects.check_size(name, packed.files[name].bytes if packed else spec.shard_bytes)
                elif packed:
                    check_size(path / ARRAYS / name, packed.files[name], PACK_AGAIN)
                else:
                    check_shard(path / ARRAYS, spec, shard)
            expected = (packed_metadata if packed else ArraySpec.metadata)(spec, record.blocks)
            check_metadata(path / ARRAYS, spec, expected)
        for group in ("", "strata", *(f"strata/{s.name}" for s in record.plan.stored_strata)):
            check_group(path / ARRAYS / group / "zarr.json")
        check_side_files(path, record)

    def excluding(self, exclusion: Exclusion | None) -> "Store":
        """Return the same store as a run sees it that leaves out what `exclusion` says."""
        view = copy(self)
        view.exclusion = exclusion
        return view

    def exclusion_at(self, ratio: float, *, training: bool, figures: bool, position_0: bool) -> Exclusion:
        """Resolve an exclusion of rows over `ratio` times the median norm of later positions; 0: of none."""
        overall = self.record.overall
        source, target = (side.norm_quantiles["0.5"] * ratio or None for side in (overall.source, overall.target))
        return Exclusion(
            source_norm=source, target_norm=target, training=training, figures=figures, position_0=position_0
        )

    @property
    def position_0_is_odd(self) -> bool:
        """Whether position 0 is a stratum beside others, and its rows are outliers or one constant."""
        first, overall = self.record.strata[0], self.record.overall
        if len(self.record.strata) == 1 or not self.record.plan.stored_strata[0].is_position_0:
            return False
        sides = ((first.source, overall.source), (first.target, overall.target))
        long = any(a.norm_quantiles["0.5"] > OUTLIER_RATIO * b.norm_quantiles["0.5"] for a, b in sides)
        return long or first.source.mean_to_deviation > CONSTANT

    @property
    def outliers(self) -> dict[str, NDArray[np.int64]]:
        """By stratum, the rows of all blocks that `exclusion` calls outliers, rising; of position 0 none if it is out.

        They are found once for all views of the store. Raises `CorruptData` when a block's statistics are damaged.
        """
        limits, is_left_out = (self.exclusion.limits, self.exclusion.position_0) if self.exclusion else ({}, False)
        key = (*limits.items(), is_left_out)
        if key not in self._outliers:
            rows = {name: part.stratum.rows for name, part in self.strata.items()
                    if not (is_left_out and part.stratum.is_position_0)}  # fmt: skip
            found = store_outliers(self.path, self.record.blocks, rows, limits, self._block_rows)
            self._outliers[key] = {name: np.zeros(0, np.int64) for name in self.strata} | found
        return self._outliers[key]

    def _block_rows(self, block: int, stratum: str, side: str) -> Rows:
        """Return the stored rows of a block's stratum."""
        array: RowArray = getattr(self.strata[stratum], side)
        rows = self.strata[stratum].stratum.rows
        out = array.room(rows)
        array.read(block * rows, (block + 1) * rows, out)
        return out

    def reading(self) -> AbstractContextManager[object]:
        """Return the readers' lock: the store is not removed while any process holds it. It may be extended.

        One in object storage has none.
        """
        if self.objects:
            return nullcontext()
        return lock(self.path / REQUEST, f"store {self.path.name}", shared=True, make=False)

    @cached_property
    def _local(self) -> LocalFolder | None:
        given = self._local_given
        if not self.packed or self.objects:
            return None
        return LocalFolder(self.path / ARRAYS, self.shard_bytes, given.folder, given.bytes)

    def _array(self, spec: ArraySpec) -> RowArray:
        if self.objects:
            return ObjectArray(self.objects, spec, self.record.blocks)
        return MappedArray(self.path / ARRAYS, spec, self.record.blocks, self._local)

    @cached_property
    def strata(self) -> dict[str, StratumRows]:
        """Mapped rows by stratum name, in order of position."""
        return {s.name: self._stratum(s) for s in self.record.plan.stored_strata}

    def _stratum(self, stratum: Stratum) -> StratumRows:
        specs = stratum_specs(self.request, stratum, self.record.d_in, self.record.d_out)
        arrays = {name: self._array(spec) for name, spec in specs.items()}
        if self.request.storage == "int8":
            scales = arrays.pop(ROW_SCALE), arrays.pop(BLOCK_UNITS), self.record.blocks
            for column, side in enumerate(SIDES):
                arrays[side] = ScaledArray(arrays[side], *scales, column, column * self.record.d_in)
        return StratumRows(stratum=stratum, **arrays)

    @cached_property
    def tokens(self) -> RowArray:
        """Token windows [sequences, context]."""
        return self._array(tokens_spec(self.request))

    @cached_property
    def documents(self) -> RowArray:
        """The document of each token [sequences, context]."""
        return self._array(documents_spec(self.request))

    def context_of(self, stratum: str, row: int) -> tuple[NDArray[Any], int]:
        """Return the token window [context] that a row of a stratum is from, and the place of the row's token in it.

        Raises `KeyError` when there is no such stratum, and `IndexError` when it has no such row.
        """
        part = self.strata[stratum]
        if not 0 <= row < self.record.blocks * part.stratum.rows:
            raise IndexError(f"stratum {stratum} has {self.record.blocks * part.stratum.rows:,} rows, not row {row}")
        at = []
        for array in (part.sequence, part.offset):
            found = array.room(1)
            array.read(row, row + 1, found)
            at.append(int(found[0]))
        window = self.tokens.room(1)
        self.tokens.read(at[0], at[0] + 1, window)
        return window[0], at[1]

    def block_checksum(self, block: int) -> str:
        """Return 16 hexadecimal digits that stand for a block's rows and tokens: stores that share them share the rows.

        They start the SHA-256 over the sizes and crc32c of its shard files, as the ledger has them. Raises
        `CorruptData` when the block's record is damaged or missing.
        """
        if block not in self._block_checksums:
            record = read_ledger(self.path, block).model_dump(mode="json", include={"files", "tokens"})
            self._block_checksums[block] = json_digest(record)[:16]
        return self._block_checksums[block]

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.path / TOKENIZER

    @cached_property
    def statistics(self) -> dict[str, dict[str, SideStatistics]]:
        """By stratum name (or `overall`) and side (`source`, `target`), over the training blocks."""
        name = statistics_path(self.record.blocks)
        path, remedy = self.path / name, f"repair it with: harvest repair {self.path}"
        if name not in self.record.files:
            raise CorruptData(f"{self.path / STORE}: it names no {name}; restore the file")
        if wrong := fault(path, self.record.files[name]):
            raise CorruptData(f"{path}: {wrong}; {remedy}")
        names = ["overall", *(s.name for s in self.record.plan.stored_strata)]
        widths = {"source": self.record.d_in, "target": self.record.d_out}
        shapes = {f"{name}/{side}/{kind}": d for name in names for side, d in widths.items() for kind in _KINDS}
        try:
            tensors = read_vectors(path, shapes)
        except CorruptData as error:
            raise CorruptData(f"{error}; {remedy}") from error
        return {
            name: {
                side: SideStatistics(mean=tensors[f"{name}/{side}/mean"], variance=tensors[f"{name}/{side}/variance"])
                for side in widths
            }
            for name in names
        }

    def arrays(self) -> list[ArraySpec]:
        """List every array."""
        return store_specs(self.request, self.record.plan.stored_strata, self.record.d_in, self.record.d_out)

    @property
    def shard_bytes(self) -> int:
        """Of all shard files, unpacked."""
        return self.record.blocks * block_bytes(self.arrays())

    def longest_norm(self, block: int, stratum: str, side: str) -> float:
        """Return the norm that no stored row is above.

        Where the block's statistics do not tell, as in older stores: one that no sound row comes near, by the
        statistics of all training rows. Raises `CorruptData` when the statistics are damaged.
        """
        if block not in self._longest:
            names = [f"{name}/{side}" for name in self.strata for side in ("source", "target")]
            self._longest[block] = longest_norms(self.path, block, names)
        found = self._longest[block][f"{stratum}/{side}"]
        return found if found < np.inf else self._far_above(stratum, side)

    def _far_above(self, stratum: str, side: str) -> float:
        """Return a thousand times the norm that a row has which makes up all of the mean squared norm."""
        part = self.record.strata[list(self.strata).index(stratum)]
        squares = (getattr(one, side).mean_squared_norm * max(one.rows, 1) for one in (part, self.record.overall))
        return 1e3 * math.sqrt(max(squares))

    def check_norms(self, stratum: str, side: str, rows: NDArray[np.int64], norms: NDArray[np.float64]) -> None:
        """Raise `CorruptData` when a row is not finite, or longer than `longest_norm`.

        `norms` [n] are of the stored `rows` [n], numbered over all blocks. Finds most flipped bits of an exponent.
        """
        array: RowArray = getattr(self.strata[stratum], side)
        blocks, places = np.unique(rows // self.strata[stratum].stratum.rows, return_inverse=True)
        limits = np.array([self.longest_norm(int(block), stratum, side) for block in blocks])[places]
        wrong = np.flatnonzero(~(np.isfinite(norms) & (norms <= limits)))
        if len(wrong):
            shard, row = divmod(int(rows[wrong[0]]), array.spec.rows_per_shard)
            norm, limit = norms[wrong[0]], limits[wrong[0]]
            said = f"has the norm {norm:.4g}, and the store's statistics allow {limit:.4g} at most"
            raise CorruptData(
                f"{self.shown}/{ARRAYS}/{array.spec.shard_path(shard)}: row {row} "
                f"{said if np.isfinite(norm) else 'is not finite'}; {remedy(array.spec, shard, self.shown)}"
            )

    def check_shards(self, *parts: Iterable[int], everything: bool = False) -> None:
        """Read shard files of some blocks, and compare their crc32c with the record.

        Of each of `parts`, some blocks, as many files as have `CHECKED_BYTES`, others each time, and one at least; or
        all of them with `everything`. What was asked for and found sound is not looked at again: the runs of a sweep,
        which share a store, check it once. Raises `CorruptData` that names the first damaged one.
        """
        wanted = [tuple(blocks) for blocks in parts]
        asked = (everything, *wanted)
        with self._checking:
            if asked in self._sound:
                return
            files: dict[str, FileRecord] = {}
            for blocks in wanted:
                files |= self._some_shards(blocks, None if everything else CHECKED_BYTES)
            for name, wrong in self._faults({f"{ARRAYS}/{name}": file for name, file in files.items()}):
                if wrong:
                    raise CorruptData(f"{self.shown}/{name}: {wrong}; {self.remedy}")
            self._sound.add(asked)

    def _faults(self, files: Mapping[str, FileRecord]) -> Iterator[tuple[str, str | None]]:
        """Compare files with their records, on all cores: yields (path below the store, what is wrong or None)."""
        if self.objects:
            yield from self.objects.faults(files)
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda item: fault(self.path / item[0], item[1]), files.items())
            yield from zip(files, found, strict=True)

    @property
    def shown(self) -> str:
        """Where the store is, for messages."""
        return self.objects.address if self.objects else str(self.path)

    @property
    def remedy(self) -> str:
        """What to do about damage, for messages."""
        return PACK_AGAIN if self.packed else f"repair it with: harvest repair {self.shown}"

    @property
    def bytes(self) -> int:
        """Of all its files, as they lie there."""
        return sum(self.objects.sizes.values()) if self.objects else size_of(self.path)

    def bytes_of(self, name: str) -> int:
        """Return the size of a file by its path below the store; 0 where it is not there."""
        if self.objects:
            return self.objects.sizes.get(name, 0)
        return (self.path / name).stat().st_size if (self.path / name).is_file() else 0

    def _shard_record(self, spec: ArraySpec, shard: int) -> FileRecord:
        """Return size and checksum of a shard file as it is."""
        name = spec.shard_path(shard)
        if self.packed:
            return self.packed.files[name]
        block = shard // spec.shards_per_block
        planned = self.record.plan.token_files
        return planned[name] if name in planned else read_ledger(self.path, block).files[name]

    def _some_shards(self, blocks: Iterable[int], most: int | None) -> dict[str, FileRecord]:
        """Return the shard files of `blocks`, with those of their tokens; at random, as many as have `most` bytes."""
        files: dict[str, FileRecord] = {}
        numbers = list(blocks)
        random.shuffle(numbers)  # no result depends on which are read
        for block in numbers:
            if most is not None and sum(file.bytes for file in files.values()) >= most:
                break
            record = read_ledger(self.path, block)
            files |= record.files | record.tokens
        if self.packed:
            files = {name: self.packed.files[name] for name in files}
        if most is None:
            return files
        names = [*files]
        random.shuffle(names)
        ends = np.cumsum([files[name].bytes for name in names])
        return {name: files[name] for name in names[: max(1, int(np.searchsorted(ends, most, side="right")))]}

    def verify(self, blocks: Container[int] | None = None) -> Iterator[tuple[str, str | None]]:
        """Read every file once, on all cores, and compare its crc32c with the record; of rows only those of `blocks`.

        Yields (path below the store, what is wrong or None) for each.
        """
        yield from record_faults(self.path, self.record)
        ledger = dict(self.record.files)
        ledger |= {f"{ARRAYS}/{name}": file for name, file in self.record.plan.token_files.items()}
        widths = self.record.d_in, self.record.d_out
        for block in range(self.record.blocks):
            try:
                record = read_ledger(self.path, block)
            except CorruptData as error:
                yield record_path(block), str(error)
                continue
            if not belongs(record, self.request, self.record.plan) or widths != (record.d_in, record.d_out):
                yield record_path(block), "the block is of another plan: of other tokens, or other numbers of rows"
            if blocks is None or block in blocks:
                ledger |= {f"{ARRAYS}/{name}": file for name, file in record.files.items()}
            ledger[moments_path(block)] = record.moments
        if self.packed:
            ledger |= {f"{ARRAYS}/{name}": file for name, file in self.packed.files.items()}
        yield from self._faults(ledger)
