"""Every setting is read: by the code that does what it says, and not by checks alone.

A setting that nothing reads is configured in vain, which is how the run that this project starts from went.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

import harvest.settings
from shared.config import Config
from tests.stores import make_store
from train.run.settings import Settings

ROOT = Path(__file__).parents[1]
CHECKS = {str(ROOT / "train" / "run" / name) for name in ("settings.py", "self_test.py", "usage.py")}
"""What resolves and checks settings, and what proves components before a run: reads there do not count."""
COMMON = ("transcoder.d_sae=64", "rows.batch_rows=48", "threads=1")
RUNS = (
    ["activation.k=6", "activation.k_start=8", "activation.k_warmup_steps=5", "rows.max_position_0_batch_share=0.1",
     "rows.position_0=train", "rows.blocks=2",
     "diversity.orthogonality.weight=1", "diversity.mined.weight=1", "diversity.co_activation.weight=1",
     "diversity.position.weight=1", "diversity.controller.max_share_above_0_7=0.1",
     "diversity.controller.max_pairs_above_0_8=0", "monitor.every=6", "monitor.least_together=2", "checkpoint.every=5",
     "diversity.merge.at=[0.5]"],
    ["activation.kind=topk", "activation.k=6", "activation.k_start=8", "activation.k_warmup_steps=5"],
    ["activation.kind=jumprelu", "auxk.dead_after_tokens=100", "diversity.merge.at=[0.5]"],
    ["activation.kind=relu", "optimizer.max_grad_norm=0.5"],
)  # fmt: skip


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models of settings that a type names, and those of their fields."""
    if isinstance(kind, type) and issubclass(kind, Config):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(kind):
        yield from models(part)


def test_every_setting_of_a_run_is_read_by_what_it_sets(command, tmp_path: Path, monkeypatch) -> None:
    store, read, lookup = make_store(tmp_path / "store"), set[tuple[str, str]](), Config.__getattribute__

    def note(self: Config, name: str) -> Any:
        if sys._getframe(1).f_code.co_filename not in CHECKS:
            read.update((kind.__name__, name) for kind in type(self).__mro__)
        return lookup(self, name)

    monkeypatch.setattr(Config, "__getattribute__", note)
    for number, options in enumerate(RUNS):
        assignments = [part for option in (*COMMON, *options) for part in ("--set", option)]
        found = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--name", number, "--steps", 12,
                        *assignments)  # fmt: skip
        assert found.code == 0, found.err
    fields = {(model.__name__, name) for model in models(Settings) for name in model.model_fields}
    assert len(fields) > 50 and ("ControllerConfig", "gain") in fields
    assert fields - read - {(name, "kind") for name in ("BatchTopK", "TopK", "JumpReLU", "ReLU")} == set()


def test_every_setting_of_a_harvest_is_read_outside_of_the_settings() -> None:
    """By name alone, since many are of hub paths only."""
    read = {
        node.attr
        for path in (ROOT / "harvest").rglob("*.py")
        if path.name != "settings.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = {name for model in models(harvest.settings.Settings) for name in model.model_fields}
    assert len(fields) > 20 and fields - read == set()
