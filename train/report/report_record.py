"""What a report holds: `report.json`, from which the page is drawn. Every figure of the page is here as numbers."""

from typing import Any, Literal

from pydantic import Field

from shared.config import Config
from shared.splice_record import SpliceRecord
from train.duplicates.correlation_report import CorrelatedPair, Directions
from train.evaluation.evaluate import Evaluation
from train.live.log_rows import UsageRecord
from train.probe.probe_record import ProbeSummary
from train.redundancy.redundancy_record import Redundancy
from train.run.settings import Extension

State = Literal["good", "look", "bad"]
STATES: dict[State, tuple[str, str]] = {"bad": ("✗", "failed"), "look": ("!", "worth a look"), "good": ("✓", "good")}
"""Sign and word of each, the worst first."""


class Check(Config):
    """One line of the verdict."""

    name: str
    state: State
    said: str
    """One sentence with the number that it rests on."""
    figure: float
    look_beyond: float
    """Beyond this, in the direction that is worse, it is worth a look."""
    bad_beyond: float
    see: str
    """The part of the page that shows it, by its id."""


class Curves(Config):
    """Series over steps; none: that row has no such figure."""

    steps: list[int]
    series: dict[str, list[float | None]]

    def of(self, *names: str) -> dict[str, list[float | None]]:
        """Return some series by name, those that are there."""
        return {name: self.series[name] for name in names if name in self.series}


class Histogram(Config):
    """Counts between `edges`; those of a logarithmic one are powers of ten."""

    edges: list[float]
    counts: list[int]
    outside: int = 0
    """What has no place between the edges, such as a density of 0."""


class Nearest(Config):
    """The largest cosine of each live latent's decoder row with another's, beside the same of random directions."""

    latents: Histogram
    random: Histogram
    """As many directions at random in as many dimensions; above 32,768 of that many, the counts scaled up."""
    median: float
    largest: float
    random_median: float
    random_largest: float


class Context(Config):
    """Tokens around a peak. The values of text from the corpus are never markup."""

    text: list[str]
    """Of each token; its number, as `#17`, where the store has no tokenizer."""
    activations: list[float | None]
    """Of each token; none: its row is not stored."""
    peak: int
    position: int
    """Of the peak, as the model counted."""


class Example(Config):
    """A latent that the report shows."""

    latent: int
    density: float
    """Share of rows on which it is active, without position 0."""
    largest: float | None
    """Activation; none: never active."""
    contexts: list[Context]


class Cluster(Config):
    """Latents that are the same by cosine and by the rows that they are active on."""

    latents: list[int]


class Duplicates(Config):
    """From a report of the correlation monitor."""

    source: str
    """Its file below the run."""
    rows: int
    largest_correlation: float
    pairs_above: dict[str, int]
    directions: Directions
    pairs: list[CorrelatedPair]
    """By falling correlation."""
    clusters: list[Cluster]
    """The largest first."""


class LatentMap(Config):
    """Active latents by the first two principal components of their unit decoder rows."""

    share: float
    """Of the variance of these rows that the two components have."""
    latents: list[int]
    x: list[float]
    """Of each of them, as the lists below."""
    y: list[float]
    density: list[float]
    prefix: list[int]
    """Size of the smallest Matryoshka prefix that holds it."""
    root: list[int]
    """The first latent of its tree of refinements; itself where it refines none."""


class Branch(Config):
    """A latent, and later ones that refine it."""

    latent: int
    density: float
    share: float | None
    """Of its active rows on which its parent is active; none: it has no parent."""
    label: str
    """What people call it."""
    peaks: list[str]
    """Tokens at its peaks."""
    children: list["Branch"]
    """The most frequent first."""
    more: int
    """Children that are not listed."""


class Refined(Config):
    """Latents of a Matryoshka group."""

    prefix: int
    live: int
    refining: int
    """That refine one of an earlier group."""


class Refinements(Config):
    """Which later latents refine an early one."""

    groups: list[Refined]
    trees: list[Branch]
    """The largest first."""


class StoreFacts(Config):
    """The store that the run read."""

    name: str
    request: str
    """Digest."""
    model: str
    corpus: str
    source_hook: str
    target_hook: str
    layer: int
    context_size: int
    d_in: int
    d_out: int
    training_rows: int
    held_out_rows: int
    """Of the blocks that figures are reported on."""
    bytes: int
    strata: dict[str, int]
    """Stored training rows of each."""
    storage: str = "bfloat16"
    """The type of stored rows."""
    storage_floor: dict[str, float] | None = None
    """By side, what it took of their variance; no fvu is below that. None where the harvest did not measure it."""

    @property
    def stored_as(self) -> str:
        """The type of rows, and what it took."""
        took = ", ".join(f"{share:.4%} of the {side}" for side, share in (self.storage_floor or {}).items())
        return f"{self.storage}, which took {took}: no fvu is below that" if took else self.storage


class Report(Config):
    """`report.json`."""

    schema_version: Literal[1] = 1
    run: str
    step: int
    """Of the weights that are described."""
    steps: int
    """That were asked for."""
    trained_rows: int | None = None
    """Tokens that the run trained on up to that step; none: `timing.jsonl` does not tell."""
    trained_seconds: float | None = None
    """How long it took; resumed parts are added up."""
    decay_share: float
    """Last share of the run, over which the learning rate falls."""
    d_sae: int
    k: float | None
    """Active latents per row that were asked for; none: the activation has no k."""
    k_trained: float | None = None
    """Those of the last step that was trained: not `k` yet while k is warming up."""
    extensions: tuple[Extension, ...] = ()
    """When the run was made longer."""
    imported: str | None = None
    """Whose transcoder it is, of an imported run; none: the run trained it."""
    verdict: list[Check]
    held_out: Evaluation
    linear_fvu: float | None
    """Of the best linear map on the same rows; none: it was not asked for."""
    splice: SpliceRecord | None = None
    """The LLM with this checkpoint in its MLP's place; none: not measured at this step."""
    probe: ProbeSummary | None = None
    """What latents mean, by labels of tokens; none: not measured at this step."""
    redundancy: Redundancy | None = None
    """Latents in whose place one does nearly as well; none: a report from before that was measured."""
    merged: dict[int, int] = Field(default_factory=dict)
    """Latents that were merged into others while the run trained, by the step after which they were."""
    training: Curves
    """Rows of `metrics.jsonl`."""
    timing: Curves
    """Rows of `timing.jsonl`, each over the time since the row before."""
    monitor: Curves
    """Reports of the correlation monitor."""
    density: Histogram
    """Of latents by the share of rows on which they are active, without position 0; logarithmic."""
    at_position_0: Histogram | None
    """Of live latents by the share of their active rows that are of position 0; none: the store tells it not apart."""
    nearest: Nearest
    duplicates: Duplicates | None
    """None: the monitor was off."""
    map: LatentMap | None = None
    """None: a report of an earlier version."""
    refinements: Refinements | None = None
    """None: a report of an earlier version."""
    examples: dict[int, Example] = Field(default_factory=dict)
    """The latents of pairs and clusters."""
    usage: UsageRecord | None
    """None: the run has not written any yet."""
    store: StoreFacts
    settings: dict[str, Any]
    software: dict[str, str]

    @property
    def reads(self) -> str:
        """The hook that the transcoder reads: of an autoencoder that of the targets."""
        return self.store.target_hook if self.settings["source"] == "target" else self.store.source_hook

    @property
    def worst_first(self) -> list[Check]:
        """The verdict, what failed first."""
        return sorted(self.verdict, key=lambda check: list(STATES).index(check.state))

    @property
    def headline(self) -> dict[str, Any]:
        """The settings that a run is known by; those that it does not have are left out."""
        settings = self.settings
        found = {
            "k": self.k,
            "d_sae": self.d_sae,
            "learning rate": settings.get("optimizer", {}).get("lr"),
            "seed": settings.get("seed"),
            "steps": self.step,
            "tokens": self.trained_rows,
            "seconds": self.trained_seconds,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def counts(self) -> dict[State, int]:
        """How many checks are in each state."""
        return {state: sum(check.state == state for check in self.verdict) for state in STATES}
