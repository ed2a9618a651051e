"""The diversity loss: terms that part latents which point the same way or are active together.

Each has its own weight and cadence, and its own row in the metrics. A cadence of r steps counts r times, so that a
weight means the same at every cadence.
Legend: F latents, O d_out, N pairs.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.config import Config, RenamedConfig
from shared.keyed import key_bits
from train.duplicates.co_activation import Correlated, co_activation_loss, mass, position_loss
from train.duplicates.correlation_report import CorrelationReport, counted
from train.duplicates.directions import Pairs, chunk, close_pairs, direction_loss, nearest
from train.duplicates.scans import Scans
from train.model.losses import at_most
from train.model.saved_tensors import fitting, numbers
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.transcoder import Transcoder

if TYPE_CHECKING:
    from train.model.kernels.triton_pairs import Together
    from train.model.kernels.triton_step import Joined

_DECAY = 0.99


class OrthogonalityConfig(Config):
    """Penalty on random chunks of live decoder rows, every few steps (OrtSAE, arXiv 2509.22033)."""

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0 switches it off."""
    every: int = Field(10, ge=1)
    """Steps between chunks."""
    rows: int = Field(1024, ge=2)
    """Decoder rows of a chunk."""
    per_row: Literal["max", "mean"] = "max"
    """Whether each row's largest cosine is penalised, or the mean squared excess over the whole chunk."""


class MinedConfig(Config):
    """Penalty on the closest pairs of all live decoder rows, found by a scan and kept until the next scan."""

    weight: float = Field(1.0, ge=0)
    """Weight of the term; 0 switches it off."""
    cost_share: float = Field(0.02, gt=0, le=1)
    """Cost of scans as a share of a step's products; it determines the steps between scans."""
    pairs: int = Field(8192, ge=1)
    """Number of pairs at most, the closest first, above their margins."""


class CoActivationConfig(Config):
    """Penalty on activity at the same time, for pairs that the monitor found correlated."""

    weight: float = Field(1.0, ge=0)
    """Weight of the term; 0 switches it off."""
    margin: float = Field(0.6, ge=0, lt=1)
    """Correlation up to which there is no penalty."""
    pairs: int = Field(1024, ge=1)
    """Number of pairs at most, the most correlated first."""


class PositionConfig(RenamedConfig):
    """Penalty on the activation at position 0 of latents that have too large a share of theirs there."""

    renamed = {"max_bos_mass_share": "max_position_0_mass_share"}

    weight: float = Field(0.0, ge=0)
    """Weight of the term; 0 switches it off."""
    max_position_0_mass_share: float = Field(0.2, ge=0, lt=1)
    """Largest share of a latent's activation, at natural frequencies, that may be at position 0 without a penalty."""


class ControllerConfig(Config):
    """Goals: after every report, weights rise while a goal is missed, and fall while it is more than met."""

    max_share_above_0_7: float | None = Field(None, ge=0, le=1)
    """Goal: at most this share of live latents have a neighbour with a cosine above 0.7; none: the weights of the
    decoder terms are fixed."""
    max_pairs_above_0_8: int | None = Field(None, ge=0, le=1000)
    """Goal: at most this many pairs correlate above 0.8; none: the weight of co-activation is fixed."""
    gain: float = Field(1.5, gt=1)
    """Factor by which a weight is multiplied or divided."""
    most: float = Field(100.0, ge=1)
    """Largest factor by which a weight may differ from its setting, up or down."""

    @property
    def on(self) -> bool:
        """Whether a goal is set."""
        return self.max_share_above_0_7 is not None or self.max_pairs_above_0_8 is not None

    def moved(self, scale: float, found: float, goal: float | None) -> float:
        """Return a weight's factor after a report that `found` so much: up above the goal, down below half of it."""
        if goal is None or goal / 2 <= found <= goal:
            return scale
        return min(scale * self.gain, self.most) if found > goal else max(scale / self.gain, 1 / self.most)


class MergeConfig(Config):
    """Merging of redundant latents: one replaces each group, and the others restart (docs/anti-duplication.md)."""

    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """When to merge, as shares of the run, such as [0.8, 0.9]; none: never. Latents that restart late have little time
    to learn."""
    rows: int = Field(32768, ge=1)
    """Training rows on which replacements are fitted; as many others judge them, or the same rows where there is one
    training block. With fewer rows, fewer rare latents are found."""
    largest_share: float = Field(0.15, gt=0, le=1)
    """Most that replacing a group by one latent may cost, at the upper end of its 95 % interval, as a share of what all
    but the most useful of the group explain. The measure of redundant latents has 0.1; with that limit, some groups are
    above it on these rows and below it on held-out rows. Planted latents that are active together on nine rows of ten
    cost 0.156 and more."""


class DiversityConfig(Config):
    """Which duplicates are penalised, and how much; and which are merged."""

    margin: float = Field(0.3, ge=0, lt=1)
    """Cosine up to which there is no penalty. Random directions already have about 1 / sqrt(d_out)."""
    cross_margin: float = Field(0.7, ge=0, lt=1)
    """The same for latents of different Matryoshka groups, where a parent may point like its child."""
    orthogonality: OrthogonalityConfig = OrthogonalityConfig()
    mined: MinedConfig = MinedConfig()
    co_activation: CoActivationConfig = CoActivationConfig()
    position: PositionConfig = PositionConfig()
    controller: ControllerConfig = ControllerConfig()
    merge: MergeConfig = MergeConfig()

    def resolve(self, d_sae: int) -> "DiversityConfig":
        """Return the same with chunks of at most as many rows as there are, with a warning."""
        if not self.orthogonality.weight:
            return self
        rows = at_most("diversity.orthogonality.rows", self.orthogonality.rows, d_sae)
        return self.model_copy(update={"orthogonality": self.orthogonality.model_copy(update={"rows": rows})})


class Diversity:
    """The diversity loss of a run, with what was mined: state that a resumed run continues from."""

    def __init__(
        self,
        transcoder: Transcoder,
        config: DiversityConfig,
        weights: Tensor,  # [B] how often each row of a batch counts at natural frequencies
        position_0: slice,  # its rows in every batch
        seed: int,
        scans: Scans | None = None,
    ) -> None:
        self._transcoder, self._config, self._seed = transcoder, config, seed
        self._scans = scans or Scans(transcoder)
        self._weights, self._at_0 = weights, torch.zeros_like(weights)
        self._at_0[position_0] = weights[position_0]
        self.scan_every = self._scans.steps_between(len(weights), config.mined.cost_share)
        if config.mined.weight:
            self._scans.expect(self.scan_every, self._floor)
        d_sae, nothing = transcoder.d_sae, torch.zeros(0, dtype=torch.int64, device=transcoder.W_dec.device)
        self.mined = Pairs(nothing, nothing)
        self._partners: SparseLatents | None = None
        self._together: Together | None = None
        """The mined and the correlated pairs by latent, for Triton's kernels, once these have asked."""
        self.changes = 0
        """How often what the terms are made from became another: pairs, or the controller's factors."""
        self.correlated: Pairs
        self._strength: Tensor
        self._correlate(Correlated.none())
        self.scales = {"direction": 1.0, "co_activation": 1.0}
        """What the controller multiplies weights by: those of decoder rows, and of co-activation."""
        self._mass = weights.new_zeros(2, d_sae)
        """Moving averages of every latent's activation: at position 0, and everywhere."""

    def value_terms(self, output: StepOutput) -> dict[str, Tensor]:
        """Return terms whose gradient reaches the latents' values; they belong in one backward with the step's loss.

        One that is joined to that loss has no gradient of its own.
        """
        together, position, terms = self._config.co_activation, self._config.position, {}
        if together.weight:
            terms["co_activation"] = self._co_activation_loss(output, together.weight * self.scales["co_activation"])
        if position.weight:
            now = torch.stack([mass(output.active, weights) for weights in (self._at_0, self._weights)])
            self._mass.copy_(_DECAY * self._mass + (1 - _DECAY) * now)
            share = self._mass[0] / self._mass[1].clamp_min(torch.finfo(now.dtype).tiny)
            excess = (share - position.max_position_0_mass_share).relu()
            terms["position"] = position.weight * position_loss(output.values, output.active, self._at_0, excess)
        return terms

    def _co_activation_loss(self, output: StepOutput, weight: float) -> Tensor:
        model = self._transcoder
        if output.joined:
            from train.model.kernels import triton_pairs  # not there without CUDA

            if self._together is None:
                strength = self._strength * (weight / (len(output.target) * model.d_sae))
                self._together = triton_pairs.together(*self.correlated, strength, model.d_sae)
            return triton_pairs.co_activation(output.joined, output.values, output.active, self._together)
        loss = co_activation_loss(output.values, output.active, self.correlated, self._strength)
        return weight * loss / model.d_sae

    def rows_read(self, step: int) -> Tensor:
        """Return the latents whose decoder rows `direction_terms` reads at `step`, rising: int64 [n]."""
        if self.asks_host(step):
            return torch.arange(self._transcoder.d_sae, device=self._transcoder.W_dec.device)
        return torch.cat(self.mined).unique()

    def direction_terms(self, dead: Tensor, step: int, joined: "Joined | None" = None) -> dict[str, Tensor]:
        """Return terms of decoder rows alone, at `step`; of latents that are not `dead` [F].

        Those that can be are `joined` to the step's loss, and have no gradient of their own.
        """
        config, terms = self._config, {}
        scale = self.scales["direction"]
        if self._draws_at(step):
            terms["orthogonality"] = scale * config.orthogonality.weight * self._orthogonality(dead, step)
        if config.mined.weight:
            if self._scans_at(step):
                self.mined = self._closest((~dead).nonzero().squeeze(1), step)
                self._partners, self.changes = None, self.changes + 1
            terms["mined"] = self._mined_loss(dead, scale * config.mined.weight, joined)
        return terms

    def _mined_loss(self, dead: Tensor, weight: float, joined: "Joined | None") -> Tensor:
        config, model = self._config, self._transcoder
        if joined and model.has_unit_decoder:
            from train.model.kernels import triton_pairs  # not there without CUDA

            if self._partners is None:
                self._partners = triton_pairs.partners(*self.mined, model.d_sae)
            margins, factor = (config.margin, config.cross_margin), weight / model.d_sae
            return triton_pairs.pair_loss(joined, model.W_dec, self._partners, model.group, dead, margins, factor)
        alive = ~(dead[self.mined.first] | dead[self.mined.second])
        loss = direction_loss(model.W_dec, self.mined, self._margins(self.mined), 2.0 * alive, model.has_unit_decoder)
        return weight * loss / model.d_sae

    def asks_host(self, step: int) -> bool:
        """Tell whether the terms at `step` need the host: for a scan, or a random chunk."""
        return self._draws_at(step) or bool(self._config.mined.weight and self._scans_at(step))

    def _draws_at(self, step: int) -> bool:
        config = self._config.orthogonality
        return bool(config.weight) and step % config.every == 0

    def _scans_at(self, step: int) -> bool:
        return step % self.scan_every == 0 and not self._scans.none_at(step, self._floor)

    def follow(self, report: CorrelationReport, correlated: Correlated) -> bool:
        """Take over what the monitor found; returns whether the controller moved a weight."""
        self._correlate(correlated)
        goals, before = self._config.controller, dict(self.scales)
        share = report.directions.share_with_neighbour_above["0.7"]
        goal = goals.max_share_above_0_7 if report.directions.step == report.step else None  # once per scan
        pairs = counted(report).pairs_above["0.8"]
        self.scales = {
            "direction": goals.moved(before["direction"], share, goal),
            "co_activation": goals.moved(before["co_activation"], pairs, goals.max_pairs_above_0_8),
        }
        return self.scales != before

    def start_anew(self, latents: Tensor) -> None:
        """Drop the pairs of `latents` [n] int64, which have become others."""
        kept = self.correlated.free_of(latents)
        self.correlated, self._strength = self.correlated.kept(kept), self._strength[kept]
        self.mined = self.mined.kept(self.mined.free_of(latents))
        self._mass[:, latents] = 0
        self._scans.forget()
        self._partners, self._together, self.changes = None, None, self.changes + 1

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {
            f"diversity.{name}.{side}": latents
            for name, pairs in (("mined", self.mined), ("correlated", self.correlated))
            for side, latents in pairs._asdict().items()
        } | {
            "diversity.strength": self._strength,
            "diversity.mass": self._mass,
            "diversity.scales": torch.tensor([*self.scales.values()]).double(),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        model, device = self._transcoder, self._transcoder.W_dec.device
        self.mined, self.correlated = (
            self._loaded_pairs(tensors, f"diversity.{name}") for name in ("mined", "correlated")
        )
        strength = torch.empty(len(self.correlated.first), dtype=model.W_dec.dtype)
        self._strength = fitting(tensors, "diversity.strength", strength).to(device)
        self._mass = fitting(tensors, "diversity.mass", self._mass).to(device)
        scales = fitting(tensors, "diversity.scales", torch.empty(len(self.scales), dtype=torch.float64))
        self.scales = dict(zip(self.scales, scales.tolist(), strict=True))
        self._partners, self._together, self.changes = None, None, self.changes + 1

    def _loaded_pairs(self, tensors: dict[str, Tensor], name: str) -> Pairs:
        d_sae, device = self._transcoder.d_sae, self._transcoder.W_dec.device
        first = numbers(tensors, f"{name}.first", d_sae)
        return Pairs(first.to(device), numbers(tensors, f"{name}.second", d_sae, len(first)).to(device))

    def _correlate(self, found: Correlated) -> None:
        """Take the most correlated pairs above the margin, as many as are penalised."""
        config, weights, self.changes = self._config.co_activation, self._transcoder.W_dec, self.changes + 1
        kept = (found.correlation > config.margin).nonzero().squeeze(1)[: config.pairs]
        self.correlated = Pairs(*(side.to(weights.device) for side in found.pairs.kept(kept)))
        self._together = None
        strength = 2 * (found.correlation[kept] - config.margin) / found.scale[kept]
        self._strength = strength.to(weights.device, weights.dtype)

    def _orthogonality(self, dead: Tensor, step: int) -> Tensor:
        config, model = self._config.orthogonality, self._transcoder
        generator = torch.Generator().manual_seed(key_bits("orthogonality", self._seed, step) % 2**63)
        latents = chunk((~dead).nonzero().squeeze(1), config.rows, generator)
        pairs, cosines = close_pairs(model.unit_decoder(), latents, self._floor, model.blas)
        if config.per_row == "max":
            weights = nearest(pairs, cosines, model.d_sae) / max(len(latents), 1)
            pairs, weights = Pairs(*(side[weights > 0] for side in pairs)), weights[weights > 0]
        else:
            weights = torch.full_like(cosines, 2 / max(len(latents) * (len(latents) - 1), 1))
        return config.every * direction_loss(model.W_dec, pairs, self._margins(pairs), weights, model.has_unit_decoder)

    def _closest(self, latents: Tensor, step: int) -> Pairs:
        pairs, cosines = self._scans.mined(step, latents, self._floor)
        found = (cosines - self._margins(pairs)).topk(min(self._config.mined.pairs, len(cosines))).indices
        found = found.sort().values  # as pairs rise: a latent's row is read once for all of its pairs
        return Pairs(*(side[found] for side in pairs))

    @property
    def _floor(self) -> float:
        return min(self._config.margin, self._config.cross_margin)

    def _margins(self, pairs: Pairs) -> Tensor:
        group, config = self._transcoder.group, self._config
        within = group[pairs.first] == group[pairs.second]
        return torch.where(within, config.margin, config.cross_margin).to(self._transcoder.W_dec.dtype)
