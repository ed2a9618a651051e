"""A small real harvest and a small real training run: their commands, what they end with, what a kill may leave."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.errors import ProjectError
from tests.faults import power
from tests.faults.power import Tree
from tests.faults.server import Result, Server


class Case(Protocol):
    """A command that is killed and resumed."""

    @property
    def stage(self) -> str:
        """Whose command it is."""
        ...

    def first(self, where: Path, *more: object) -> list[object]:
        """The arguments that make the result in the folder `where`, and more."""
        ...

    def resume(self, server: Server, where: Path) -> Result:
        """Go on as a user would, after whatever `where` was left with."""
        ...

    def wrong(self, where: Path) -> str | None:
        """What a kill or a power cut must not leave, or None."""
        ...

    def result(self, where: Path) -> Tree:
        """All that two uninterrupted runs have in common, litter included."""
        ...


@dataclass(frozen=True)
class Harvest:
    """Three blocks, two of them held out, of two strata."""

    model: Path
    text: Path
    stage: str = "harvest"

    @staticmethod
    def make(folder: Path) -> "Harvest":
        """With a model of one layer."""
        from tests.llms import make_gemma, texts, write_jsonl

        model = make_gemma(folder / "model", num_hidden_layers=1)
        return Harvest(model, write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(80)]))

    def first(self, where: Path, *more: object, tokens: int = 512) -> list[object]:
        """Into the cache `where`."""
        settings = {
            "windows.context_size": 32,
            "store.edges": [0, 4],
            "store.block_sequences": 16,
            "store.held_out_blocks": 2,
            "capture.batch_sequences": 8,
            "workers": 1,
        }
        options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        given = ["--model", self.model, "--text", self.text, "--cache", where, "--tokens", tokens, "--layer", 0]
        return ["run", *given, *options, *more]

    def resume(self, server: Server, where: Path) -> Result:
        """The same command again."""
        return server.run(*self.first(where))

    def wrong(self, where: Path) -> str | None:
        """Records tell the truth: what the ledger names is there, and a finished store verifies."""
        from shared.store.checks import fault, read_ledger
        from shared.store.layout import ARRAYS, LEDGER, STORE
        from shared.store.store import Store

        for store in [path for path in where.iterdir() if path.is_dir()] if where.is_dir() else []:
            try:
                for path in sorted((store / LEDGER).glob("*.json")):
                    record = read_ledger(store, int(path.stem))
                    for name, file in {**record.files, **record.tokens}.items():
                        if found := fault(store / ARRAYS / name, file):
                            return f"{path} names {name}: {found}"
                if (store / STORE).exists():
                    for name, found in Store.open(store).verify():
                        if found:
                            return f"{store} is finished, and {name} damaged: {found}"
            except ProjectError as error:
                return str(error)
        return None

    def result(self, where: Path) -> Tree:
        """The whole cache."""
        return power.read(where)


@dataclass(frozen=True)
class Training:
    """Twelve steps with checkpoints, reports and samples."""

    store: Path
    stage: str = "train"

    @staticmethod
    def make(folder: Path) -> "Training":
        """On a synthetic store."""
        from tests.stores import make_store

        return Training(make_store(folder / "store", keep={0: 0.5}, tokenizer=True).path)

    def first(self, where: Path, *more: object, name: str = "run") -> list[object]:
        """Into the folder of runs `where`."""
        settings = {
            "transcoder.d_sae": 32,
            "activation.k": 4,
            "activation.k_start": 4,
            "rows.batch_rows": 48,
            "threads": 1,
            "log_every": 2,
            "checkpoint.every": 4,
            "evaluation.every": 6,
            "monitor.every": 5,
            "samples.rows": 300,
        }
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return ["run", "--store", self.store, "--runs", where, "--name", name, "--steps", 12, *options, *more]

    def resume(self, server: Server, where: Path) -> Result:
        """`train resume`, or the first command where no run was begun."""
        if (where / "run" / "config.json").exists():
            return server.run("resume", where / "run")
        return server.run(*self.first(where))

    def wrong(self, where: Path) -> str | None:
        """Every checkpoint that has its name verifies."""
        from train.model import checkpoint

        try:
            for path in checkpoint.steps(where / "run"):
                if found := checkpoint.verify(path):
                    return found
        except ProjectError as error:
            return str(error)
        return None

    def result(self, where: Path) -> Tree:
        """All but the clock's figures."""
        return {name: data for name, data in power.read(where).items() if Path(name).name != "timing.jsonl"}


CASES: dict[str, Callable[[Path], Case]] = {"harvest": Harvest.make, "train": Training.make}


@contextmanager
def serving(case: Case, scratch: Path) -> Iterator[Server]:
    """A server of a case's stage that has run it once."""
    with Server(case.stage, scratch / "printed") as server:
        server.warm(*case.first(scratch / "warm"))
        yield server


def torn(where: Path, published: Mapping[str, set[bytes]]) -> str | None:
    """A file that holds what was never published under its name, or None; logs grow in place, and locks are empty."""
    for name, data in power.read(where).items():
        parts = Path(name).parts
        passing = parts[-1] == "reserve" or any(
            part.startswith(".") or part.endswith((".tmp", ".lock", ".jsonl")) for part in parts
        )
        if data is not None and not passing and data not in published.get(name, ()):
            return f"{name} holds {len(data)} bytes that were never published"
    return None


def same(found: Tree, expected: Tree) -> str | None:
    """The first difference between two trees, or None."""
    for name in sorted({*found, *expected}):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is left over"
        if found[name] != expected[name]:
            return f"{name} differs"
    return None


def owned_by_root() -> bool:
    """Whether file systems can be mounted."""
    return os.geteuid() == 0
