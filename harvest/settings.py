"""Settings of a harvest: one model per component. Every field is read; sizes carry their unit."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.bounds import MAX_BLOCKS, MAX_CONTEXT, MAX_STRATA, Count, Edges, Label, Position, Sequences
from shared.check_settings import Change
from shared.config import Changes, Config, build, changes_of, load_preset, override
from shared.store.layout import Attention, Documents
from shared.store.row_arrays import FloatType, StorageType
from shared.store.strata import check_strata

EMBEDDED = "embedded"
PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"
MOST_REFUSED = 2**53
_AT_TRAINING = "it is a setting of training: python -m train run --store STORE"
ALIASES = {
    **dict.fromkeys(("context_length", "seq_len", "max_length", "max_seq_len", "ctx_len"), "windows.context_size"),
    **dict.fromkeys(("batch_size", "store_batch_size_prompts", "n_batches_in_buffer"), "capture.batch_sequences"),
    **dict.fromkeys(("model_name", "model"), "model.name"),
    **dict.fromkeys(("layer", "hook_layer"), "capture.layers"),
    **dict.fromkeys(("hook_name", "hookpoint", "hookpoints"), "capture.source"),
    **dict.fromkeys(("dataset", "dataset_path", "dataset_name"), "text.name"),
    **dict.fromkeys(("training_tokens", "n_tokens", "num_tokens", "total_tokens", "max_tokens"), "tokens"),
    **dict.fromkeys(("num_workers", "threads"), "workers"),
    **dict.fromkeys(("text_column", "column_name"), "text.column"),
    **dict.fromkeys(("d_sae", "k", "lr", "learning_rate", "steps", "expansion_factor", "activation"), _AT_TRAINING),
}
"""Names of settings in other libraries, with our name or a sentence."""
_OF_A_NAME = ("revision", "subset", "split", "column", "kind")


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class ModelSettings(Config):
    """Which model runs, and how."""

    name: str = Field(default=EMBEDDED, min_length=1)
    """`embedded`, a local Hugging Face folder, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; its main branch if not given."""
    dtype: FloatType = "float32"
    """The type of the forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda if there is a GPU."""
    attention: Attention = "eager"
    """How attention is computed, by transformers' name. Values other than `eager` can be faster on a GPU, and round
    differently; which are available depends on the model's family."""


class TextSettings(Config):
    """Which text is harvested, and how it is read."""

    name: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_one_or_more, json_schema_input_type=str | tuple[str, ...]),
    ] = Field(default=(EMBEDDED,), min_length=1)
    """`embedded`, a data set on the hub, or local files or folders of them: .jsonl and .txt (a row per line), .json,
    .csv, .tsv, .parquet, .arrow; those of text also compressed (.gz, .zst, .bz2)."""
    subset: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; its main branch if not given."""
    split: str = "train"
    """Split of a hub data set, or of a local folder of several."""
    column: str | None = None
    """Column to read; if not given `text`, or else the only one that holds text, chat messages or token ids."""
    kind: Literal["auto", "text", "messages", "input_ids"] = "auto"
    """Kind of content in the column; `auto` decides by the first row that is not empty."""
    streaming: bool = False
    """Read rows in their own order, without downloading, decompressing or converting all of them first."""
    max_refused: int = Field(default=0, ge=0, le=MOST_REFUSED)
    """Maximum number of rows to skip, and count, because they are not documents: no such column, no text, bad JSON, a
    chat that the template refuses."""


class WindowSettings(Config):
    """How documents become token windows."""

    context_size: int = Field(default=256, ge=2, le=MAX_CONTEXT)
    """Tokens per window, BOS included."""
    bos: bool | Literal["auto"] = "auto"
    """Start every window with the tokenizer's BOS; `auto`: if it has one."""
    separator: bool | Literal["auto"] = "auto"
    """Put the tokenizer's EOS after every document, even if it is also the BOS; `auto`: if it has one."""
    documents: Documents = "joined"
    """`apart`: positions restart at every document, and attention does not cross from one to the next."""


class CaptureSettings(Config):
    """What to record in a forward pass."""

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (8,)
    """Layers, from 0; one store each, all from one pass."""
    source: str = "hook_resid_mid"
    """The transcoder's input: a hook of the layer's block, or a full name such as `blocks.7.hook_out`."""
    target: str = "hook_mlp_out"
    """The transcoder's target, named in the same way."""
    batch_sequences: Sequences | Literal["auto"] = "auto"
    """Windows per forward pass; `auto` gives a few thousand tokens, fewer for wide models on CPU."""

    @field_validator("layers")
    @classmethod
    def _distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError(f"layers must be distinct and at least 0, got {list(layers)}")
        return layers

    def hooks(self, layer: int) -> tuple[str, str]:
        """Return the full names of the source's and the target's hook at `layer`."""
        source, target = (
            name if name.startswith("blocks.") else f"blocks.{layer}.{name}" for name in (self.source, self.target)
        )
        return source, target


class StoreSettings(Config):
    """What to store."""

    edges: Edges = (0, 1, 4, 16, 64, 256, 1024, 4096)
    """First position of each stratum; those beyond the context are ignored."""
    keep: dict[Position, float] = Field(default={}, max_length=MAX_STRATA)
    """Share of a stratum's rows to store, by its first position; 1 if not given."""
    cap: dict[Position, Count] = Field(default={}, max_length=MAX_STRATA)
    """Maximum number of a stratum's rows to store per block, by its first position; no limit if not given."""
    exclude_special: bool = False
    """Leave out the rows at special tokens (BOS and EOS among them)."""
    max_norm_quantile: float = Field(default=1.0, gt=0, le=1)
    """Leave out the rows of a stratum whose source norm is above this quantile of its block; 1 leaves out none."""
    storage: StorageType = "bfloat16"
    """The type of stored activations. `int8` takes half the disk of bfloat16: each row and each dimension has a scale,
    and the harvest measures the error."""
    block_sequences: Sequences = 256
    """Windows per block, the unit that is committed, resumed and repaired."""
    max_block_bytes: int = Field(default=4 * 2**30, ge=1)
    """Maximum size of a block's rows over all layers, in bytes; `block_sequences` is halved until they fit. Two blocks
    are in memory."""
    held_out_blocks: int = Field(default=2, ge=0, le=MAX_BLOCKS)
    """Blocks of the first documents that are held out of training, in addition to `tokens`."""
    unembedding: bool = True
    """Keep the unembedding and the final norm, for the tokens that each latent promotes."""


class Settings(Config):
    """A harvest."""

    label: Label
    """Start of the store's name; the preset's name if not given."""
    tokens: int = Field(ge=1)
    """Tokens of the training windows, BOS included; rounded up to whole blocks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every permutation."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Threads that run batches side by side on CPU; 0 is one per core. The bytes written do not depend on it."""
    model: ModelSettings = ModelSettings()
    text: TextSettings = TextSettings()
    windows: WindowSettings = WindowSettings()
    capture: CaptureSettings = CaptureSettings()
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _strata(self) -> "Settings":
        check_strata(self.store.edges, self.store.keep, self.store.cap, self.windows.context_size)
        return self


def load_settings(
    preset: str = DEFAULT_PRESET,
    changes: Changes = (),
    *,
    file: Path | str | None = None,
    model: Path | str | None = None,
    text: Path | str | Sequence[Path | str] = (),
    layers: Sequence[int] = (),
    tokens: int | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> Settings:
    """Read the settings of a preset, or of a TOML `file` in its place, with what is given, and then `changes`, put in.

    `changes`: values by dotted name, such as {"windows.context_size": 128}, or as `--set` takes them. `name`: the start
    of the store's, else that of `model`, of the preset or the file. Raises `UserError` that names the setting.
    """
    file = Path(file) if file else None
    texts = tuple(str(one) for one in ((text,) if isinstance(text, str | Path) else text))
    settings = {"label": file.stem if file else preset, **load_preset(PRESETS, preset, file)}
    for group, other in (("text", texts), ("model", model)):
        table = settings.get(group)
        if other and isinstance(table, dict) and "name" in table:  # what else it says is said of that name
            dropped = (*_OF_A_NAME, "streaming") if other == (EMBEDDED,) else _OF_A_NAME
            settings[group] = {key: value for key, value in table.items() if key not in dropped}
    label = name if name is not None else _label_of(model)
    options = (
        ("--name", "label", label),
        ("--model", "model.name", None if model is None else str(model)),
        ("--text", "text.name", texts or None),
        ("--layer", "capture.layers", tuple(layers) or None),
        ("--tokens", "tokens", tokens),
        ("--seed", "seed", seed),
    )
    given = [Change(f"{option} {_said(value)}", key, value) for option, key, value in options if value is not None]
    made = [*given, *changes_of(changes)]
    return build(Settings, override(settings, made), str(file) if file else f"preset {preset}", made, ALIASES)


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _label_of(model: Path | str | None) -> str | None:
    """Return the start of a store's name by a model that was given; none: by the preset."""
    if model is None or str(model) == EMBEDDED:
        return None
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.")
    return plain[:64] or None
