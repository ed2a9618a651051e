"""What the measure of redundant latents found: a part of reports, evaluations and comparisons."""

from shared.config import Config


class RedundantGroup(Config):
    """Latents in whose place one does nearly as well."""

    latents: list[int]
    best: int | None
    """The latent whose encoder does best in the place of all; none: the sum of theirs that was fitted does."""
    fvu_rise: float
    """With the best single latent in their place, which is active on no more rows than they are."""
    share: float
    """That rise, of what removing each alone costs, summed over all but the one that costs most."""
    freed: float
    """Active latents per row that are saved."""
    cosine: float
    """The smallest of two of their decoder rows."""


class Found(Config):
    """Pairs of one kind."""

    pairs: int
    redundant: int
    """Of these, both of whose latents are in one group."""


class Merged(Config):
    """All groups replaced by their single latents at once, on all held-out rows."""

    fvu: float
    """Before."""
    l0: float
    fvu_rise: float
    """At the same thresholds."""
    l0_after: float
    fvu_rise_at_equal_l0: float
    """With the thresholds of all other latents lowered, so that the saved activations are used."""
    l0_at_equal: float


class Redundancy(Config):
    """Redundant latents of a transcoder, by held-out rows."""

    rows: tuple[int, int]
    """On which the single latents are fitted, and on which they are judged."""
    largest_share: float
    """Of what they explain, that merging latents may cost for them to be redundant."""
    least_rows: int
    """Rows of either kind on which a latent is active, to be judged."""
    live: int
    """Latents that are active on the rows."""
    not_judged: int
    """Of these, active on too few, or of no use alone: without them the error does not rise."""
    redundant: int
    """Latents fewer, if one takes the place of each group."""
    candidates: dict[str, Found]
    """By how a pair was found; `all` counts each once."""
    groups: list[RedundantGroup]
    """The largest first, of equally many latents the one with the smallest share."""
    merged: Merged
