"""What a report of the correlation monitor holds, and how two of them differ."""

from typing import Literal

from shared.config import Config


class Latent(Config):
    """One latent of a listed pair."""

    latent: int
    prefix: int
    """Size of the smallest prefix that holds it."""
    rows: int
    """Rows of the sample on which it is active, position 0 included."""
    strata: dict[str, float]
    """Share of each stratum's rows on which it is active."""


class CorrelatedPair(Config):
    """Two latents by every measure."""

    latents: tuple[Latent, Latent]
    cosine: float
    """Of their decoder rows."""
    correlation: float
    """Pearson's over `rows`, without position 0."""
    correlation_with_position_0: float
    """The same over the report's sample, with it."""
    jaccard: float
    """Rows on which both are active by rows on which either is, without position 0."""
    rows_together: int
    """Of `rows`, those on which both are active."""
    rows: int | None = None
    """Over which the pair was counted: those of the sample, or those since it is tracked, of which old ones count less.
    None: a report from before pairs were tracked, which has those of the sample."""
    within_segment: bool
    """Both enter with the same prefix."""
    reports: int
    """Reports in a row that listed the pair, this one included."""

    @property
    def key(self) -> tuple[int, int]:
        """Which pair it is."""
        return self.latents[0].latent, self.latents[1].latent


class Correlations(Config):
    """Pairs of latents over the rows of one selection."""

    rows: int
    largest: float
    pairs_above: dict[str, int]
    """By correlation."""


class Directions(Config):
    """Decoder rows of live latents."""

    step: int
    """When they were scanned."""
    live: int
    share_with_neighbour_above: dict[str, float]
    """By cosine, of live latents."""
    share_within_segment_above: dict[str, float]
    """The same counting neighbours of the same Matryoshka group alone."""
    largest: float
    effective_number: float
    """Sum over live latents of 1 / (neighbours with a cosine above 0.7, itself included)."""
    effective_rank: float
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""


class Sample(Config):
    """The rows that a report looks at."""

    rows_of: Literal["training steps", "held-out blocks"]
    first_step: int
    """Of the training rows; of held-out rows, the step of the weights."""
    last_step: int
    strata: dict[str, int]
    """Rows of each."""


class Trend(Config):
    """This report's figures less those of the report before."""

    since_step: int
    pairs_above_0_8: int
    share_above_0_7: float


class CorrelationReport(Config):
    """`anti_duplication_logs/correlation-<step>.json`."""

    schema_version: Literal[1] = 1
    step: int
    sample: Sample
    least_together: int
    without_position_0: Correlations
    """With it, if the store's first stratum holds more than position 0."""
    with_position_0: Correlations
    tracked: Correlations | None = None
    """Of pairs that earlier samples proposed, without position 0, over the rows since: all on CPU, on CUDA those of
    later samples. The listed pairs are these. Old rows count less, and `rows` is how many the oldest pair has. None:
    in the first report, on held-out rows, and in reports from before pairs were tracked."""
    pairs_without_room: int | None = None
    """How many of this report's sample cannot be tracked, since so many others are. None: as above."""
    strata: dict[str, Correlations] | None
    """The same over the rows of each; none: of training steps, whose strata are small."""
    directions: Directions
    pairs: list[CorrelatedPair]
    """Largest correlation first."""
    clusters: list[list[int]]
    """As of the scan: latents that are the same by cosine and by Jaccard index, the largest cluster first."""
    persisting_pairs: int
    """Of the listed, those that the report before listed, too."""
    change: Trend | None
    """None: this is the first report."""


def counted(report: CorrelationReport) -> Correlations:
    """Return how pairs correlate without position 0: those that are tracked, or else those of the sample."""
    return report.tracked or report.without_position_0


def change_of(now: CorrelationReport, before: CorrelationReport | None) -> Trend | None:
    """Return what changed since the report before; none: there is none."""
    if not before:
        return None
    alike = (now.tracked, before.tracked) if now.tracked and before.tracked else None
    pairs, then = alike or (now.without_position_0, before.without_position_0)
    return Trend(
        since_step=before.step,
        pairs_above_0_8=pairs.pairs_above["0.8"] - then.pairs_above["0.8"],
        share_above_0_7=now.directions.share_with_neighbour_above["0.7"]
        - before.directions.share_with_neighbour_above["0.7"],
    )
