"""Where an exported transcoder comes from, as other libraries want to be told."""

from typing import NamedTuple

from train.run.load_run import LoadedRun


class Origin(NamedTuple):
    """What a transcoder was trained on."""

    model: str
    """A hub name, or the name of a local folder."""
    weights: str
    """SHA-256 over the model's configuration and weights."""
    layer: int
    source_hook: str
    """The hook that is read: the target's hook of an autoencoder of the targets."""
    target_hook: str
    is_transcoder: bool
    """False for an autoencoder of the targets."""
    context_size: int
    bos: bool
    """Whether every window starts with BOS."""
    text: str
    k: int | None
    """Active latents per row, where that is fixed."""
    prefixes: tuple[int, ...]
    run: str
    """The run's folder name and step."""
    imported: str | None
    """Whose transcoder it is; none: the run trained it."""

    @property
    def hooks(self) -> tuple[str, str]:
        """Source and target relative to the block of `layer`; whole names where they are of another block."""
        block = f"blocks.{self.layer}."
        return self.source_hook.removeprefix(block), self.target_hook.removeprefix(block)


def origin_of(loaded: LoadedRun) -> Origin:
    """Tell where the transcoder of a run comes from, by the run and its store."""
    request, transcoder = loaded.rows.store.request, loaded.transcoder
    k = transcoder.activation.expected_l0
    is_transcoder = loaded.config.settings.source == "source"
    source_hook = request.source_hook if is_transcoder else request.target_hook
    if transcoder.source_rms_eps is not None:
        source_hook = f"blocks.{request.layer}.ln2.hook_normalized"
    imported = loaded.config.imported
    return Origin(
        model=request.model.name,
        weights=request.model.weights,
        layer=request.layer,
        source_hook=source_hook,
        target_hook=request.target_hook,
        is_transcoder=is_transcoder,
        context_size=request.context_size,
        bos=request.bos,
        text=request.corpus.name,
        k=None if k is None else round(k),
        prefixes=transcoder.prefixes,
        run=f"{loaded.path.resolve().name}, step {loaded.step}",
        imported=imported.name if imported else None,
    )
