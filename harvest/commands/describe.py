"""What a finished store holds, in words and as JSON, and whether its files are what was written."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from harvest.commands.shuffle_quality import BATCH_ROWS, LIMIT, as_json, measure
from harvest.writer.blocks import SIDES
from shared.console.progress import Progress
from shared.console.terminal import PlainConsole
from shared.errors import CorruptData
from shared.files.object_store import is_address, local_folder
from shared.store.checks import read_store_record
from shared.store.layout import StratumSummary
from shared.store.store import Local, Store

Facts = dict[str, Any]


def describe(path: Path, local: Local | None = None, *, shuffle: bool = False, run_rows: int | None = None) -> Facts:
    """Return the store's record, with its size on disk in bytes, and its shuffle, if that is to be measured.

    `run_rows` as in `harvest.commands.shuffle_quality.measure`.
    Raises `UserError` when there is no finished store.
    """
    store = Store.open(path, local)
    record = store.record
    facts = record.model_dump(mode="json")
    del facts["plan"]["token_files"]
    if shuffle:
        facts["shuffle"] = [as_json(measure(store, rows, run_rows)) for rows in BATCH_ROWS]
    packed = sum(file.bytes for file in store.packed.files.values()) if store.packed else None
    sizes = {"bytes": store.bytes, "shard_bytes": store.shard_bytes, "packed_shard_bytes": packed}
    return {"path": store.shown, **sizes, "training_blocks": len(record.training_blocks), **facts}


def show(facts: Facts) -> None:
    """Print the facts as tables on stdout."""
    console = PlainConsole(width=None if PlainConsole().is_terminal else 140)
    console.print(_request_table(facts))
    console.print(_strata_table(facts))
    console.print(_packing_table(facts))
    console.print(
        f"{facts['blocks']} blocks, {facts['request']['held_out_blocks']} of them held out; {facts['bytes']:,} bytes; "
        f"rows of {facts['d_in']} -> {facts['d_out']} values",
        highlight=False,
    )
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
    for key, value in facts["request"].items():
        if key == "imported":
            value = {**value, "files": f"{len(value['files'])} ({value['files'][0]['name']} first)"}
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, text)
    for name, number in facts["software"].items():
        table.add_row(name, number)
    return table


def _strata_table(facts: Facts) -> Table:
    columns = ["positions", "rows", "stand for", "special", "over norm", "repeated"]
    for side in ("source", "target"):
        columns += [f"{side} norm 1%", "50%", "99.9%", "mean/dev", "outliers"]
    table = Table(*columns, title="strata, training blocks")
    table.columns[0].no_wrap = True
    plans = {plan["start"]: plan["segments"] for plan in facts["plan"]["strata"]}
    for summary in [*facts["strata"], facts["overall"]]:
        found, whole = StratumSummary.model_validate(summary), summary is facts["overall"]
        segments = [] if whole else plans[found.start]
        table.add_row(*_stratum_cells(found, "overall " if whole else "", segments))
    return table


def _stratum_cells(summary: StratumSummary, prefix: str, segments: list[Facts]) -> list[str]:
    cells = [f"{prefix}{summary.start}-{summary.stop - 1}", f"{summary.rows:,}", f"{summary.natural_rows:,}"]
    for kind in ("special", "over_norm", "repeated"):
        cells.append(f"{sum(counts[kind] for counts in segments):,}" if segments else "")
    for side in (summary.source, summary.target):
        cells += [f"{side.norm_quantiles[share]:.3g}" for share in ("0.01", "0.5", "0.999")]
        cells += [f"{side.mean_to_deviation:.3g}", f"{side.outlier_rows:,}"]
    return cells


def _shuffle_table(shuffle: list[Facts]) -> Table:
    columns = ("batch", "batches", "run", "neighbours of one document", "in random order", *SIDES)
    table = Table(*columns, title="variance of batch means")
    for found in shuffle:
        ratios = [f"{found['ratio'][side]:.3f} ± {found['error'][side]:.3f}" for side in SIDES]
        shares = [f"{found[name]:.3%}" for name in ("neighbours", "neighbours_expected")]
        table.add_row(f"{found['batch_rows']:,}", f"{found['batches']:,}", f"{found['run_rows']:,}", *shares, *ratios)
    return table


def _packing_table(facts: Facts) -> Table:
    packing = facts["plan"]["packing"]
    names = list(dict.fromkeys(name for counts in packing for name in counts))
    table = Table("segment", "blocks", *(name.replace("_", " ") for name in names), title="packing")
    for number, (blocks, counts) in enumerate(zip(facts["plan"]["segments"], packing, strict=True)):
        table.add_row(str(number), str(blocks), *(f"{counts.get(name, 0):,}" for name in names))
    return table


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


def verify(path: Path) -> Verification:
    """Check the records, and every file's size and checksum; all faults are found, not only the first.

    A store in object storage must open: what is wrong with its records is raised.
    """
    if is_address(path):
        return _verify(Store.open(path))
    path = local_folder(path)
    record = read_store_record(path)
    found = _verify(Store(path, record))
    changed = found.faults and read_store_record(path) != record
    return verify(path) if changed else found  # extended meanwhile: statistics of the shorter store are gone


def _verify(store: Store) -> Verification:
    faults = {}
    began, files, size = time.monotonic(), 0, 0
    with Progress("verify", store.bytes, "bytes") as bar:
        for name, wrong in store.verify():
            files += 1
            size += store.bytes_of(name)
            bar.update(size)
            if wrong:
                faults[name] = wrong
    if not faults:
        try:
            Store.open(store.place)
        except CorruptData as error:
            faults["."] = str(error)
    seconds = time.monotonic() - began
    return Verification(path=store.shown, files=files, bytes=size, seconds=seconds, faults=faults)
