"""Reads the settings that the command line gives, and checks them before torch is imported."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from shared.check_settings import Change, check_settings, names_in, with_defaults
from shared.config import Changes, changes_of, load_preset, override
from shared.errors import UserError
from shared.files.durable import read_json
from shared.store.layout import StoreRequest
from train.live.run_files import CONFIG, config_file

PRESETS = Path(__file__).parent / "presets"
BASE, TINY = "base", "tiny"
"""The preset for any store, and that for stores of the embedded model."""
_EMBEDDED = "embedded"
"""What a store calls that model."""
_AT_HARVEST = "it is decided when the store is made: python -m harvest run"
ALIASES = {
    **dict.fromkeys(("learning_rate", "lr"), "optimizer.lr"),
    **dict.fromkeys(("lr_warmup_steps", "lr_warm_up_steps", "warmup"), "optimizer.warmup_steps"),
    **dict.fromkeys(("batch_size", "train_batch_size", "train_batch_size_tokens"), "rows.batch_rows"),
    **dict.fromkeys(("k", "l0", "topk", "top_k"), "activation.k"),
    **dict.fromkeys(("architecture", "activation_fn", "kind"), "activation.kind"),
    **dict.fromkeys(("expansion_factor", "dict_size", "num_latents", "n_latents", "width"), "transcoder.d_sae"),
    **dict.fromkeys(("sparsity_coefficient", "l1_lambda"), "activation.l1_coefficient"),
    **dict.fromkeys(("matryoshka_widths", "group_sizes"), "transcoder.prefixes"),
    **dict.fromkeys(("num_steps", "n_steps", "max_steps", "total_training_steps", "epochs"), "steps"),
    **dict.fromkeys(("dead_feature_window", "dead_feature_threshold"), "auxk.dead_after_tokens"),
    "grad_clip": "optimizer.max_grad_norm",
    "auxk_alpha": "auxk.coefficient",
    "dtype": "product_dtype",
    **dict.fromkeys(
        ("context_size", "context_length", "seq_len", "tokens", "training_tokens", "total_training_tokens", "layer",
         "layers", "model", "model_name", "text", "dataset", "hook_name", "hookpoints"), _AT_HARVEST,
    ),
}  # fmt: skip
"""What others call a setting, with our name or a sentence."""


class Read(NamedTuple):
    """Settings as tables within each other, not yet those of a run."""

    tables: dict[str, Any]
    origin: str
    """What they come from, for messages."""
    changes: list[Change]
    """Those that were put in."""


def preset_for(store: StoreRequest) -> str:
    """Return the preset that is for a store, where none is named: its numbers were tried on such rows."""
    return TINY if store.model.name == _EMBEDDED else BASE


def read_settings(preset: str = BASE, changes: Changes = (), file: Path | None = None) -> Read:
    """Read a preset, or in its place a TOML `file` or the `config.json` of a run, and put `changes` in.

    Raises `UserError` that names the option, when a setting is unknown or has a value that it cannot have. How settings
    go together, and with a store, is checked by `train.run.rules.read_and_check` and `train.run.settings.resolve`.
    """
    made = changes_of(changes)
    tables = _of_run(file) if file and file.name == CONFIG else load_preset(PRESETS, preset, file)
    found = Read(override(tables, made, variants=("activation",)), str(file) if file else f"preset {preset}", made)
    check_settings(_schema(), found.tables, found.origin, found.changes, ALIASES)
    return found


def setting_called(name: str) -> str:
    """Return the one setting that has this name, or a sentence on where it is decided; nothing for no such name."""
    known = names_in(_schema())
    if name in known or name in ALIASES:
        return ALIASES.get(name, name)
    ending = [one for one in known if one.endswith(f".{name}")]
    return ending[0] if len(ending) == 1 else ""


def settings_with_defaults(read: Read) -> dict[str, Any]:
    """Return all settings as tables: those that were read, and the defaults of the others."""
    return with_defaults(_schema(), read.tables)


def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("train") / "schemas" / "settings.json").read_text())
    return found


def _of_run(file: Path) -> dict[str, Any]:
    """Return the settings that a run was started with: as asked for, or, in older runs, as they were resolved."""
    data = read_json(config_file(file.parent))
    settings = data.get("settings") if isinstance(data, Mapping) else None
    asked = data.get("asked") or settings if isinstance(data, Mapping) else None
    if not isinstance(settings, dict) or not isinstance(asked, dict):
        raise UserError(f"{file} is not the {CONFIG} of a run: it holds no settings")
    return asked | {"steps": settings.get("steps")}  # it may have been made longer


def options(**given: object) -> list[Change]:
    """Return the changes that short options such as `--steps 300` make; those that are None were not given."""
    return [Change(f"--{name} {value}", name, value) for name, value in given.items() if value is not None]
