"""Finds what is damaged in a store, and makes exactly that again."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harvest.commands.describe import verify
from harvest.digests import known_folder
from harvest.llm.model_files import ModelFiles, find_model, read_shape
from harvest.run import object_cache
from harvest.run.pipeline import lock_store
from harvest.run.ranks import Ranks
from harvest.settings import EMBEDDED, MOST_REFUSED, ModelSettings, TextSettings
from harvest.text.corpus import open_corpus
from harvest.writer import finish, ledger
from harvest.writer.recover_records import refuse_packed
from harvest.writer.target import Push, Target, publish_records, push_nowhere
from harvest.writer.tokens import lay_out_again, restore
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.object_store import address, is_address, local_folder, naming, require_below_bucket
from shared.files.untrusted import refuse_links
from shared.store.checks import read_store_record
from shared.store.import_origin import UNKNOWN
from shared.store.layout import (
    ARRAYS,
    DOCUMENTS,
    LEDGER,
    TOKENS,
    CorpusIdentity,
    StoreRecord,
    StoreRequest,
    row_specs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is wrong with a store."""

    blocks: tuple[int, ...]
    """Blocks to compute again."""
    token_files: tuple[str, ...]
    """Shard files of `tokens` and `documents`, by path below the Zarr root."""
    others: tuple[str, ...]
    """Other files, by path below the store."""

    def __bool__(self) -> bool:
        """Tell whether anything is wrong."""
        return bool(self.blocks or self.token_files or self.others)

    def names(self) -> str:
        """Name the damaged parts."""
        blocks = f"blocks {', '.join(map(str, self.blocks))}" if self.blocks else ""
        return "; ".join(part for part in (blocks, *self.token_files, *self.others) if part)

    def text(self) -> str:
        """Say what was made again, in one line."""
        return f"made again: {self.names()}" if self else "nothing is damaged"


def find_damage(path: Path, record: StoreRecord, blocks: Container[int] | None = None) -> Damage:
    """Read every file of the store at `path`, whose `store.json` is `record`; of rows only those of `blocks`."""
    block_of = {
        f"{ARRAYS}/{spec.shard_path(shard)}": block
        for spec in row_specs(record.request, record.plan.stored_strata, record.d_in, record.d_out)
        for block in range(record.blocks)
        for shard in spec.block_shards(block)
    }
    damaged, token_files, others = set(), [], []
    for name in verify(path, blocks).faults:
        if name in block_of:
            damaged.add(block_of[name])
        elif name.startswith(f"{LEDGER}/"):
            damaged.add(int(name.split("/")[1].split(".")[0]))
        elif name.startswith((f"{ARRAYS}/{TOKENS}/c/", f"{ARRAYS}/{DOCUMENTS}/c/")):
            token_files.append(name.removeprefix(f"{ARRAYS}/"))
        else:
            others.append(name)
    return Damage(blocks=tuple(sorted(damaged)), token_files=tuple(token_files), others=tuple(others))


def repair(
    path: Path,
    model: str | None,
    text: Sequence[str],
    workers: int,
    imported_from: Sequence[Path] = (),
    *,
    inexact: bool = False,
) -> Damage:
    """Make again what is damaged, and nothing else; returns what it was.

    `path` is a folder or an address of objects. `model` and `text` say where they lie, if that is not what the store
    names, and `imported_from` the files that an imported store was made from; `inexact` lets a GPU of another kind
    compute what is damaged. Raises `UserError` when they are not the store's own, `CorruptData` when the store is still
    damaged at the end, and of objects what `Objects` and `Lease` raise.
    """
    path = local_folder(path)
    mend = partial(_mend, model=model, text=text, workers=workers, imported_from=imported_from, inexact=inexact)
    if is_address(path):
        return _repair_objects(path, model, mend)
    refuse_packed(path)
    with lock_store(path):
        refuse_links(path)
        durable.sweep(path)
        record = read_store_record(path)
        _check_model(record.request, model)
        if damage := find_damage(path, record):
            mend(path, record, damage)
            if left := find_damage(path, read_store_record(path)):
                raise _still_damaged(str(path), left)
    return damage


def _check_model(request: StoreRequest, model: str | None) -> None:
    """Raise `UserError` when a model is given that is not the store's, before all of the store is read."""
    if model and not request.imported:
        own_model(request, model)


def _repair_objects(path: Path, model: str | None, mend: Callable[..., None]) -> Damage:
    """Repair a store in object storage: in a local folder with its records and tokens, sent block by block."""
    require_below_bucket(path)
    with object_cache.writing(path.parent, [path.name], stand_ins=False) as cache:
        here, shown = cache.folder / path.name, address(path)
        with naming(here, shown):
            refuse_packed(here)
            record = read_store_record(here)
            _check_model(record.request, model)
            if damage := find_damage(path, record):
                mend(here, record, damage, push=cache.push)
                cache.push(here)
                # Of rows, what was just made: reading all of them once more can take hours.
                if left := find_damage(path, read_store_record(here), damage.blocks):
                    raise _still_damaged(shown, left)
    return damage


def _still_damaged(shown: str, left: Damage) -> CorruptData:
    return CorruptData(f"{shown} is still damaged: {left.names()}; remove it and harvest it again")


def _mend(
    path: Path,
    record: StoreRecord,
    damage: Damage,
    *,
    model: str | None,
    text: Sequence[str],
    workers: int,
    imported_from: Sequence[Path],
    inexact: bool,
    push: Push = push_nowhere,
) -> None:
    """Make damaged parts again in the folder `path`; `push` hears of it when a block is committed."""
    target = Target(path=path, request=record.request, plan=record.plan)
    if record.request.imported:
        _import_again(target, damage, imported_from, model, push)
        return
    files = own_model(record.request, model)
    if damage.token_files:
        _restore(target, damage.token_files, files, text)
    finish.drop_damaged(target)
    from harvest.run.runner import Runner

    widths = {record.request.source_hook: record.d_in, record.request.target_hook: record.d_out}
    ranks = Ranks()
    runner = Runner(
        folder=files.folder, widths=widths, workers=workers or ranks.cores, ranks=ranks, inexact=inexact, push=push
    )
    runner.capture([target], {target.path: set(damage.blocks)})
    publish_records(target)
    ledger.grow_arrays(target, range(target.blocks))
    finish.finish(target, files)


def _import_again(target: Target, damage: Damage, imported_from: Sequence[Path], model: str | None, push: Push) -> None:
    if not imported_from:
        raise UserError(
            f"{target.path} was imported, and is repaired from the same files: harvest repair {target.path} --from PATH"
        )
    from harvest.imports.import_pairs import repair_from, write_blocks

    inputs = repair_from(target.path, target.request, imported_from, model)
    publish_records(target)
    lay_out_again(target, damage.token_files, inputs.windows)
    write_blocks(target, inputs, damage.blocks, push)


def own_model(request: StoreRequest, name: str | None) -> ModelFiles:
    """Find the model that a store was made with, by its own name or by the one given. Raises `UserError`.

    A local folder is also looked for where a model of these weights lay last.
    """
    wanted = request.model
    if wanted.weights == UNKNOWN:
        raise UserError("the store was imported without --model, so there is no model to compare its rows with")
    is_local = wanted.revision is None and wanted.name != EMBEDDED
    if not name and is_local and (folder := known_folder(wanted.weights)):
        name = str(folder)
    if not name and is_local and not Path(wanted.name).is_dir():
        raise UserError(
            f"the store was made with the model in a local folder called {wanted.name}, which is not here; say where "
            "it lies now, under any name: --model FOLDER"
        )
    settings = ModelSettings(name=name or wanted.name, revision=None if name else wanted.revision)
    files = find_model(settings)
    for what, found, expected in (
        ("config.json or weights", files.weights_digest(), wanted.weights),
        ("tokenizer files", files.tokenizer_digest(), request.tokenizer),
    ):
        if found != expected:
            raise UserError(
                f"{files.folder} is not the model of the store: its {what} have the digest {found[:12]}, those of "
                f"the store's {wanted.name} {expected[:12]}; pass --model FOLDER"
            )
    return files


def own_text(corpus: CorpusIdentity, names: Sequence[str]) -> TextSettings:
    """Return the settings that find a store's text again, by its own name or at the places given."""
    if corpus.name == EMBEDDED:
        return TextSettings()
    hub = {"revision": corpus.revision, "subset": corpus.subset, "split": corpus.split or "train"}
    return TextSettings(
        name=tuple(names) or (corpus.name,),
        column=corpus.column,
        kind=corpus.kind,
        streaming=corpus.order == "as_read",
        max_refused=MOST_REFUSED,
        **({} if names else hub),
    )


def _restore(target: Target, names: Sequence[str], files: ModelFiles, text: Sequence[str]) -> None:
    from harvest.text.tokenize import Encoder

    wanted = target.request.corpus
    settings = own_text(wanted, text)
    corpus = open_corpus(settings, wanted.separator, target.request.seed)
    if corpus.identity.model_copy(update={"name": wanted.name}) != wanted:  # by what it holds, under any name
        raise UserError(
            f"{target.path}: its tokens are damaged, and {', '.join(settings.name)} is not the text it was made from; "
            "pass --text, or run the harvest that made it again"
        )
    vocabulary = read_shape(files.folder).vocabulary
    restore(target, names, corpus, Encoder(files.folder, wanted, vocabulary, settings.max_refused))
