"""What a finished store holds, in words and as JSON, and whether its files are what was written."""

import time
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from harvest.commands.shuffle_quality import BATCH_ROWS, LIMIT, as_json, measure
from harvest.writer.int8_blocks import MOST_LOST
from shared.console.progress import Progress
from shared.console.terminal import PlainConsole
from shared.errors import CorruptData
from shared.files.object_store import is_address, local_folder
from shared.store.checks import read_store_record
from shared.store.layout import StratumSummary
from shared.store.object_rows import ObjectRows
from shared.store.packed import own_folder
from shared.store.row_arrays import SIDES
from shared.store.store import Local, Store

Facts = dict[str, Any]
_SEGMENTS = 3
"""In a table that fits 80 columns."""
_PREFIX = "opened-objects-"


def describe(path: Path, local: Local | None = None, *, shuffle: bool = False, run_rows: int | None = None) -> Facts:
    """Return the store's record, with its size on disk in bytes, and its shuffle, if that is to be measured.

    `run_rows` as in `harvest.commands.shuffle_quality.measure`.
    Raises `UserError` when there is no finished store.
    """
    with nullcontext(Store.open(path, local)) if shuffle else open_records(path) as store:
        facts = _facts(store)
        if shuffle:
            facts["shuffle"] = [as_json(measure(store, rows, run_rows)) for rows in BATCH_ROWS]
    return facts


def _facts(store: Store) -> Facts:
    record = store.record
    facts = record.model_dump(mode="json")
    del facts["plan"]["token_files"]
    packed = sum(file.bytes for file in store.packed.files.values()) if store.packed else None
    sizes = {"bytes": store.bytes, "shard_bytes": store.shard_bytes, "packed_shard_bytes": packed}
    return {"path": store.shown, **sizes, "training_blocks": len(record.training_blocks), **facts}


def show(facts: Facts) -> None:
    """Print the facts as tables on stdout."""
    console = PlainConsole(width=None if PlainConsole().is_terminal else 140)
    tables = [_request_table(facts), _rows_table(facts), *_norm_tables(facts), *_packing_tables(facts)]
    for table in tables:
        console.print(table)
    console.print(
        f"{facts['blocks']} blocks, {facts['request']['held_out_blocks']} of them held out; {facts['bytes']:,} bytes; "
        f"rows of {facts['d_in']} -> {facts['d_out']} values",
        highlight=False,
    )
    if floor := facts.get("storage_floor"):
        lost = ", ".join(f"{share:.4%} of the {side}" for side, share in floor.items())
        verdict = "yes" if max(floor.values()) <= MOST_LOST else "NO"
        console.print(f"int8 took {lost}: no fvu is below that. At most {MOST_LOST:.1%}: {verdict}", highlight=False)
    if packed := facts["packed_shard_bytes"]:
        ratio = facts["shard_bytes"] / packed
        console.print(
            f"packed: {facts['shard_bytes']:,} bytes of rows in {packed:,}, {ratio:.2f} to 1", highlight=False
        )
    if "shuffle" in facts:
        console.print(_shuffle_table(facts["shuffle"]))
        worst = max(max(found["ratio"].values()) for found in facts["shuffle"])
        verdict = "yes" if worst <= LIMIT else "NO"
        console.print(f"variance at most {LIMIT:.2f} times that of independent rows: {verdict}, {worst:.3f} at worst")
        if worst > LIMIT:
            better = min(found["better_run_rows"] for found in facts["shuffle"])
            shorter = f"train with --set rows.run_rows={better}, and check it here with --run-rows {better}; or "
            console.print(
                f"{shorter if better < facts['shuffle'][0]['run_rows'] else ''}harvest with larger blocks "
                "(store.block_sequences, store.max_block_bytes)"
            )


def _request_table(facts: Facts) -> Table:
    table = Table("setting", "value", title=facts["path"])
    table.columns[1].overflow = "fold"
    for key, value in facts["request"].items():
        if key == "imported":
            value = {**value, "files": f"{len(value['files'])} ({value['files'][0]['name']} first)"}
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    for name, number in facts["software"].items():
        table.add_row(name, number)
    return table


def _rows_table(facts: Facts) -> Table:
    table = _numbers("positions", "rows", "stand for", "special", "over norm", "repeated")
    table.title = "strata, training blocks"
    plans = {plan["start"]: plan["segments"] for plan in facts["plan"]["strata"]}
    for name, summary in _strata(facts):
        segments = [] if summary.start not in plans or name.startswith("overall") else plans[summary.start]
        kinds = ("special", "over_norm", "repeated")
        counts = [f"{sum(one[kind] for one in segments):,}" if segments else "" for kind in kinds]
        table.add_row(name, f"{summary.rows:,}", f"{summary.natural_rows:,}", *counts)
    return table


def _norm_tables(facts: Facts) -> list[Table]:
    """Return a table for each side: norms of its rows, and how far their mean is from 0."""
    tables = []
    for side in SIDES:
        table = _numbers("positions", "norm 1%", "50%", "99.9%", "mean/dev", "outliers")
        table.title = f"norms of the {side}"
        for name, summary in _strata(facts):
            found = getattr(summary, side)
            norms = [f"{found.norm_quantiles[share]:.3g}" for share in ("0.01", "0.5", "0.999")]
            table.add_row(name, *norms, f"{found.mean_to_deviation:.3g}", f"{found.outlier_rows:,}")
        tables.append(table)
    return tables


def _strata(facts: Facts) -> list[tuple[str, StratumSummary]]:
    """Return the strata by their positions, and last all of them together."""
    found = [StratumSummary.model_validate(one) for one in (*facts["strata"], facts["overall"])]
    names = [f"{one.start}-{one.stop - 1}" for one in found]
    return list(zip([*names[:-1], f"overall {names[-1]}"], found, strict=True))


def _numbers(*columns: str) -> Table:
    """Return a table of numbers, which are never cut."""
    table = Table(*columns)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _shuffle_table(shuffle: list[Facts]) -> Table:
    columns = ("batch", "batches", "run", "neighbours of one document", "in random order", *SIDES)
    table = Table(*columns, title="variance of batch means")
    for found in shuffle:
        ratios = [f"{found['ratio'][side]:.3f} ± {found['error'][side]:.3f}" for side in SIDES]
        shares = [f"{found[name]:.3%}" for name in ("neighbours", "neighbours_expected")]
        table.add_row(f"{found['batch_rows']:,}", f"{found['batches']:,}", f"{found['run_rows']:,}", *shares, *ratios)
    return table


def _packing_tables(facts: Facts) -> list[Table]:
    """Return tables of what became of the tokens: a column per segment, a few to each table."""
    segments = list(zip(facts["plan"]["segments"], facts["plan"]["packing"], strict=True))
    tables = []
    for first in range(0, len(segments), _SEGMENTS):
        some = segments[first : first + _SEGMENTS]
        names = list(dict.fromkeys(name for _, counts in some for name in counts))
        table = _numbers("packing", *(f"segment {first + i}" for i in range(len(some))))
        table.add_row("blocks", *(f"{blocks:,}" for blocks, _ in some))
        for name in names:
            table.add_row(name.replace("_", " "), *(f"{counts.get(name, 0):,}" for _, counts in some))
        tables.append(table)
    return tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What reading every file of a store found."""

    path: str
    files: int
    bytes: int
    seconds: float
    faults: dict[str, str]
    """Cause by file."""

    def as_json(self) -> Facts:
        """Return plain values."""
        faults = [{"file": name, "cause": cause} for name, cause in self.faults.items()]
        sizes = {"files": self.files, "bytes": self.bytes, "seconds": round(self.seconds, 3)}
        return {"path": self.path, **sizes, "faults": faults}

    def text(self) -> str:
        """Return one line per damaged file, or one line that says all is well."""
        if self.faults:
            return "\n".join(f"{name}: {cause}" for name, cause in self.faults.items())
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return f"{self.path}: {self.files:,} files, {self.bytes:,} bytes intact, {rate:,.0f} MB/s"


def verify(path: Path, blocks: Container[int] | None = None) -> Verification:
    """Check the records, and every file's size and checksum; all faults are found, not only the first.

    Of shard files of rows, only those of `blocks`, if they are given.
    """
    path = local_folder(path)
    with _unchecked(path) as store:
        found = _verify(store, blocks)
    if found.faults:
        with _unchecked(path) as now:
            changed = now.record != store.record  # extended meanwhile: statistics of the shorter store are gone
        if changed:
            return verify(path, blocks)
    return found


@contextmanager
def _unchecked(path: Path) -> Iterator[Store]:
    """Give the store at `path`, of which only `store.json` must be whole, and `packed.json` of a packed one.

    Of objects, the records are fetched anew: copies that others made may be of before some damage.
    """
    if not is_address(path):
        yield Store(path, read_store_record(path))
        return
    with own_folder(_PREFIX) as folder, closing(ObjectRows(path, folder, 0)) as objects, objects.naming():
        yield Store(objects.mirror, read_store_record(objects.mirror), None, objects)


@contextmanager
def open_records(path: Path) -> Iterator[Store]:
    """Open a store whose rows are not read through it: nothing of them is kept or decoded.

    Of objects, the records are fetched anew, as for `verify`. Errors in the context name the store's address.
    """
    if not is_address(path):
        yield Store.open(path)
        return
    with own_folder(_PREFIX) as folder:
        store = Store.open(path, Local(folder=folder, bytes=0))
        assert store.objects is not None
        with closing(store.objects) as objects, objects.naming():
            yield store


def _verify(store: Store, blocks: Container[int] | None) -> Verification:
    faults = {}
    began, files, size = time.monotonic(), 0, 0
    with Progress("verify", store.bytes, "bytes") as bar:
        for name, wrong in store.verify(blocks):
            files += 1
            size += store.bytes_of(name)
            bar.update(size)
            if wrong:
                faults[name] = wrong.replace(str(store.path), store.shown)
    if not faults:
        try:
            store.check()
        except CorruptData as error:
            faults["."] = str(error).replace(str(store.path), store.shown)
    seconds = time.monotonic() - began
    return Verification(path=store.shown, files=files, bytes=size, seconds=seconds, faults=faults)
