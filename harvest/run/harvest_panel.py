"""The panel of a harvest: its blocks, what they take on the disk, and how they are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType

from harvest.writer.target import Target
from shared.console.panel import Fitted, Kept, Pace, inner, pairs, panel, per_second, size
from shared.console.terminal import Verbosity, verbosity
from shared.files import durable
from shared.files.disk_usage import Measured
from shared.store.layout import block_bytes, row_specs

_BESIDE = 76
"""Columns from which figures are in two columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is known of a harvest: the blocks that a process makes, for some targets at once, there and to come."""

    targets: Sequence[Target]
    missing: Mapping[Path, set[int]]
    """Of each target, kept up to date by those who make them."""
    mine: frozenset[int]
    """Those that this process makes, of the ones that were missing when it began."""
    there: int
    """Blocks that others, or an earlier process, had made."""
    widths: Mapping[str, int]
    batch: int
    device: str
    workers: int
    disk: Measured[int]
    """Bytes that are free."""
    body: Kept = field(default_factory=Kept)

    @property
    def made(self) -> int:
        """By this process, for all targets."""
        return len(self.mine - set().union(*self.missing.values()))

    @property
    def total(self) -> int:
        """Those that were there, and those that this process makes."""
        return self.there + len(self.mine)

    @property
    def written(self) -> int:
        """Bytes of shard files of rows, in blocks that are there."""
        return sum(self._bytes(target) * (self.total - self._to_come(target)) for target in self.targets)

    @property
    def to_come(self) -> int:
        """Bytes of shard files of rows, in blocks that this process will make."""
        return sum(self._bytes(target) * self._to_come(target) for target in self.targets)

    def note(self) -> str:
        """Return the text for the end of a plain line."""
        return f"{self.there + self.made:,}/{self.total:,} blocks  {size(self.written)} written"

    def detail(self, block: int) -> str:
        """Return the text for the end of the plain line that is printed when a block is written."""
        space = f"{size(self.to_come)} to come  {size(self.disk.value())} free"
        return f"block {block} is written  {self.note()}  {space}  batch {self._batch}  {self._device}"

    def panel(self, pace: Pace) -> RenderableType:
        """Return the whole panel."""
        return Fitted(lambda width, _: self._panel(pace, 2 if inner(width) >= _BESIDE else 1))

    def _panel(self, pace: Pace, columns: int) -> RenderableType:
        rows, tokens = sum(s.rows for s in self.targets[0].strata), self.targets[0].request.block_tokens
        rate = per_second(pace.rate * rows / tokens)
        facts = [
            ("blocks", f"{self.there + self.made:,} of {self.total:,}"),
            *([("resumed", f"{self.there:,} blocks were there")] if self.there else []),
            ("rows", f"{(self.there + self.made) * rows:,} of each layer"),
            ("written", size(self.written)),
            ("to come", size(self.to_come)),
            ("disk", f"{size(self.disk.value())} free"),
            ("batch", self._batch),
            ("device", self._device),
        ]
        stores = [("store" if i == 0 else "", target.path.name) for i, target in enumerate(self.targets)]
        more = [pairs(self._more())] if verbosity() == Verbosity.VERBOSE else []
        body = self.body.drawing(tuple(facts), lambda: Group(pairs(stores), pairs(facts, columns), *more))
        return panel("harvest", pace, "", body, more_rates=[f"{rate} rows/s"])

    def _more(self) -> list[tuple[str, str]]:
        request = self.targets[0].request
        return [
            ("model", f"{request.model.name}, {request.model.dtype}"),
            ("hooks", ", ".join(self.widths)),
            *((f"positions {s.name}", f"{s.rows:,} rows per block") for s in self.targets[0].strata),
        ]

    @property
    def _batch(self) -> str:
        return f"{self.batch:,} windows of {self.targets[0].request.context_size:,}"

    @property
    def _device(self) -> str:
        return f"cpu, {self.workers} threads" if self.device == "cpu" else self.device

    def _to_come(self, target: Target) -> int:
        return len(self.mine & self.missing[target.path])

    def _bytes(self, target: Target) -> int:
        widths = (self.widths[target.request.source_hook], self.widths[target.request.target_hook])
        return block_bytes(row_specs(target.request, target.strata, *widths))


def free_on(path: Path) -> Measured[int]:
    """Measure the bytes that are free on the disk of `path`."""
    return Measured(lambda: durable.free_bytes(path))
