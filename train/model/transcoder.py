"""The transcoder: parameters, normalisation, and the step from rows to the terms of the loss.

    pre_acts = (x - mean_x) / scale_x @ W_enc + b_enc          [B, F]; x over its root mean square first, if asked for
    latents  = ReLU(select(pre_acts))                          (row, latent, value) triples
    prefix p: (y - mean_y) / scale_y ~ latents[:, :p] @ W_dec[:p] + b_dec [+ x_normalised @ W_skip]

Legend: B rows, D d_in, O d_out, F d_sae, P prefixes, N pairs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, overload

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from shared.bounds import Width
from shared.config import Config, read_record
from shared.files import durable
from shared.keyed import key_bits
from train.live.run_files import CONFIG
from train.model import blas, checkpoint
from train.model.activations import Activation
from train.model.joined_step import joined_losses
from train.model.kernels import guarded, plain
from train.model.kernels.base import Groups, Kernels, SparseOps
from train.model.kernels.sparse_ops import sparse_ops
from train.model.losses import AuxKConfig, auxk_weight, matryoshka_weight
from train.model.sizes import check_decoder_norm, check_prefixes, multiple
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.unit_rows import drop_parallel_part, normalise_rows

if TYPE_CHECKING:
    from train.model.kernels.triton_step import Noted


class TranscoderConfig(Config):
    """The shape of a transcoder."""

    d_sae: int | str = 4096
    """Latents; or a multiple of d_in, such as `8x`."""
    prefixes: tuple[int, ...] | None = None
    """Sizes of the Matryoshka prefixes, rising to d_sae; none: n/16, n/8, n/4, n/2, n. `[d_sae]`: no Matryoshka."""
    whole_weight: float = Field(1.0, gt=0)
    """Weight in the loss of the whole transcoder's error, relative to that of each smaller prefix. A larger value makes
    the whole better and the smaller prefixes worse. The mean weight is 1."""
    decoder_norm: Literal["auto", "unit", "free"] = "unit"
    """`unit`: decoder rows always have norm 1. `free`: they start at 0, and their norm is trained, as in sparsify's
    transcoders; the first steps then point each row at what its latent predicts, and the error is lower. `auto`: `free`
    if k is fixed, `unit` if a penalty determines how many latents are active."""
    encoder_scale: float = Field(1.0, gt=0)
    """Initial norm of the encoder's columns."""
    skip: bool = False
    """Add a linear map from source to target beside the latents."""
    source_rms_eps: float | None = Field(None, gt=0, le=1)
    """Replace every source row x by x / sqrt(mean(x^2) + this), as a model's RMSNorm does before its gain, instead of
    shifting and scaling it by the store's statistics. From `hook_resid_mid` this gives `ln2.hook_normalized`, which the
    transcoders of Gemma Scope read. None: off."""

    def resolve(self, d_in: int, activation: Activation) -> "TranscoderConfig":
        """Return the same with `d_sae` and `prefixes` as numbers. Raises `UserError` when they do not fit."""
        d_sae = multiple("transcoder.d_sae", self.d_sae, d_in, "8x")
        default = tuple(sorted({max(1, d_sae // n) for n in (16, 8, 4, 2, 1)}))
        prefixes = self.prefixes or default
        check_prefixes(prefixes, d_sae)
        activation.check(d_sae)
        check_decoder_norm(self.decoder_norm, activation.kind, needs_unit=activation.needs_unit_decoder)
        norm = self.decoder_norm
        if norm == "auto":
            norm = "unit" if activation.needs_unit_decoder or activation.expected_l0 is None else "free"
        return self.model_copy(update={"d_sae": d_sae, "prefixes": prefixes, "decoder_norm": norm})


class Normalisation(NamedTuple):
    """What source and target rows are shifted and scaled by: each side has its own."""

    source_mean: Tensor
    """[D] float32"""
    source_scale: float
    """Root mean square deviation per dimension."""
    target_mean: Tensor
    """[O] float32"""
    target_scale: float


class TranscoderOutput(NamedTuple):
    """What a trained transcoder makes of source rows."""

    reconstruction: Tensor
    """[..., O] the predicted target rows, in the LLM's own units and the dtype of the source rows"""
    latents: SparseLatents
    """The active latents. Rows are numbered over all leading dimensions, as by `x.reshape(-1, d_in)`."""


class Transcoder(nn.Module):
    """Parameters in float32. `W_enc` [D, F] lies latent by latent in memory, as its gradient comes.

    `Transcoder.load` gives a trained one, and `forward`, `encode` and `decode` are for its use on an LLM's activations.
    """

    def __init__(
        self, d_in: int, d_out: int, config: TranscoderConfig, activation: Activation, normalisation: Normalisation
    ) -> None:
        super().__init__()
        assert isinstance(config.d_sae, int) and config.prefixes, "resolve the configuration first"
        self.d_sae, self.prefixes, self.activation = config.d_sae, config.prefixes, activation
        self._encoder_scale = config.encoder_scale
        self.has_unit_decoder = config.decoder_norm == "unit"
        """Whether decoder rows have norm 1."""
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out)) if config.skip else None
        thresholds = activation.initial_thresholds(self.d_sae)
        self.log_threshold = None if thresholds is None else nn.Parameter(thresholds.log())
        self.source_mean, self.target_mean = nn.Buffer(normalisation.source_mean), nn.Buffer(normalisation.target_mean)
        self.source_scale = nn.Buffer(torch.tensor(normalisation.source_scale, dtype=torch.float32))
        self.source_rms_eps = config.source_rms_eps
        self.target_scale = nn.Buffer(torch.tensor(normalisation.target_scale, dtype=torch.float32))
        edges = torch.tensor(self.prefixes)
        self.blas: blas.Blas = "torch"
        self.kernels: Kernels = "plain"
        self.product_dtype = torch.float32
        self.tf32 = False
        """Whether a product in float32 may round its sides to TF32, on CUDA."""
        self.guarded: guarded.Guarded | None = None
        """The search of training steps, where it is not `select` on a whole product."""
        self.group = nn.Buffer(torch.bucketize(torch.arange(self.d_sae), edges, right=True), persistent=False)
        shares = torch.ones(len(self.prefixes))
        shares[-1] = config.whole_weight
        self.prefix_shares = nn.Buffer(shares / shares.mean(), persistent=False)
        """[P] What each prefix's error weighs, 1 on average."""
        self._evenly = config.whole_weight == 1
        self.inference_threshold = nn.Buffer(torch.zeros(self.d_sae), persistent=False)
        """[F] Calibrated: a latent is active above it. Of a checkpoint, once that is loaded."""
        self._zeros = nn.Buffer(torch.zeros(self.d_sae), persistent=False)
        self._guess = nn.Buffer(torch.zeros(()), persistent=False)
        self.nothing = nn.Buffer(torch.zeros(1, d_out), persistent=False)
        """[1, O] a reconstruction that starts from 0"""
        self.low_follows = False
        """Whether the optimizer writes what a product in a lower type reads, beside the weights."""
        self._low: tuple[Tensor, Tensor] | None = None
        self._low_of = (-1, -1)
        self._kept_weight: tuple[int, Tensor] | None = None
        self.gradient_norms: dict[str, Noted] = {}
        """What kernels have noted of gradients' norms since the gradients were new."""

    @classmethod
    def load(cls, path: Path | str, step: int | None = None, device: str | torch.device = "cpu") -> Self:
        """Load a trained transcoder from a run's folder, or from the folder of one of its checkpoints.

        Of a run, the checkpoint of `step`, or the newest one that verifies. No store and no LLM library is needed.
        Raises `UserError` when there is no such run or checkpoint, and `CorruptData` when one is damaged.
        """
        run, found = checkpoint.of(Path(path), step)
        config = read_record(_Shape, durable.read_json(run / CONFIG), run / CONFIG)
        settings, still = config.settings, Normalisation(torch.zeros(config.d_in), 1.0, torch.zeros(config.d_out), 1.0)
        model = cls(config.d_in, config.d_out, settings.transcoder, settings.activation, still)
        model.load_checkpoint(found)
        return model.to(device).eval()

    def load_checkpoint(self, found: checkpoint.Checkpoint) -> Tensor:
        """Take over a checkpoint's weights, normalisation and thresholds; returns the thresholds [F].

        Raises `CorruptData` naming the tensor that does not fit.
        """
        expected = self.state_dict() | {"threshold": self.b_enc.detach()}
        tensors = checkpoint.load_weights(found, expected)
        threshold = tensors.pop("threshold").to(self.b_enc.device)
        self.load_state_dict(tensors)
        self.inference_threshold.copy_(threshold)
        return threshold

    def forward(self, x: Tensor, prefix: int | None = None) -> TranscoderOutput:
        """Predict target rows from source rows `x` [..., D] in the LLM's own units.

        Latents are active above the calibrated thresholds. `prefix`: by the first so many latents alone, one of
        `prefixes`. Gradients reach `x` and the parameters. Raises `ValueError` on another width, or no such prefix.
        """
        latents = self.encode(x)
        return TranscoderOutput(self.decode(latents, x, prefix), latents)

    @overload
    def encode(self, x: Tensor, *, dense: Literal[False] = False) -> SparseLatents: ...

    @overload
    def encode(self, x: Tensor, *, dense: Literal[True]) -> Tensor: ...

    def encode(self, x: Tensor, *, dense: bool = False) -> SparseLatents | Tensor:
        """Return the latents of source rows `x` [..., D] that are active above the calibrated thresholds.

        As (row, latent, value) triples, rows numbered as by `x.reshape(-1, d_in)`; or `dense`, as [..., F].
        """
        if x.shape[-1] != len(self.W_enc):
            raise ValueError(f"rows are {x.shape[-1]} wide, and this transcoder reads rows of {len(self.W_enc)}")
        pre_acts = self.normalised_source(x.reshape(-1, x.shape[-1]).float()) @ self.W_enc + self.b_enc
        is_active = pre_acts > self.inference_threshold
        if dense:
            return pre_acts.where(is_active, 0.0).reshape(*x.shape[:-1], -1)
        rows, latents = is_active.nonzero(as_tuple=True)
        return SparseLatents.of(rows, latents, pre_acts[rows, latents], pre_acts.shape)

    def decode(self, latents: SparseLatents | Tensor, x: Tensor | None = None, prefix: int | None = None) -> Tensor:
        """Return the target rows that `latents` stand for, in the LLM's own units: [..., O].

        `latents` are of `encode`, as triples or dense [..., F]; `x` [..., D] are the source rows, which a skip
        connection needs. With triples, the result has the leading dimensions and the dtype of `x`, or is float32
        [B, O] without it. `prefix` as in `forward`. Raises `ValueError`.
        """
        if prefix is not None and prefix not in self.prefixes:
            raise ValueError(f"prefix must be one of {list(self.prefixes)}, got {prefix}")
        if self.W_skip is not None and x is None:
            raise ValueError("this transcoder has a skip connection: pass the source rows, decode(latents, x)")
        most, shape = prefix or self.d_sae, x.shape[:-1] if x is not None else None
        if isinstance(latents, SparseLatents):
            kept = latents.latents < most
            values = latents.values[kept].unsqueeze(1) * self.W_dec[latents.latents[kept]]
            y = values.new_zeros(len(latents.starts) - 1, self.W_dec.shape[1])
            y = y.index_add(0, latents.rows[kept], values)
        else:
            shape = latents.shape[:-1]
            y = latents.reshape(-1, self.d_sae)[:, :most] @ self.W_dec[:most]
        y = y + self.b_dec
        if self.W_skip is not None and x is not None:
            y = y + self.normalised_source(x.reshape(-1, x.shape[-1]).float()) @ self.W_skip
        y = y * self.target_scale + self.target_mean
        return y.reshape(*(shape if shape is not None else y.shape[:-1]), -1).to(x.dtype if x is not None else y.dtype)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set random unit decoder rows; the encoder is their scaled transpose where widths agree, else random too.

        Where the norm of decoder rows is free they are 0 instead, and the encoder is what it would be.
        """
        generator = torch.Generator().manual_seed(key_bits("transcoder", seed) % 2**63)
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.normalise_decoder()
        if self.W_enc.shape[0] == self.W_dec.shape[1]:
            self.W_enc.copy_(self.W_dec.T)
        else:
            rows = torch.randn(self.d_sae, self.W_enc.shape[0], generator=generator)
            self.W_enc.copy_((rows / rows.norm(dim=1, keepdim=True)).T)
        self.W_enc.mul_(self._encoder_scale)
        if not self.has_unit_decoder:
            self.W_dec.zero_()

    def normalise_decoder(self) -> None:
        """Give every decoder row unit norm."""
        normalise_rows(self.W_dec)

    def remove_parallel_gradient(self) -> None:
        """Drop the part of the decoder's gradient that the next normalisation would undo."""
        assert self.W_dec.grad is not None
        drop_parallel_part(self.W_dec.grad, self.W_dec)

    def unit_decoder(self) -> Tensor:
        """Return the decoder rows [F, O] without gradient, each divided by its norm; a row of 0 stays 0."""
        rows = self.W_dec.detach()
        if self.has_unit_decoder:
            return rows
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)

    def normalised(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [B, D] and [B, O] shifted and scaled by the store's statistics."""
        return self.normalised_source(source), (target - self.target_mean).div_(self.target_scale)

    def normalised_source(self, source: Tensor) -> Tensor:
        """Return rows [B, D] shifted and scaled by the store's statistics; by their root mean square if so set."""
        return (self.over_rms(source) - self.source_mean).div_(self.source_scale)

    def over_rms(self, source: Tensor) -> Tensor:
        """Return rows [B, D] in the units that a transcoder in other libraries reads: see `source_rms_eps`."""
        if self.source_rms_eps is None:
            return source
        return source / (source.square().mean(dim=1, keepdim=True) + self.source_rms_eps).sqrt()

    @torch.no_grad()
    def pre_acts(self, x: Tensor) -> Tensor:
        """Compute the pre-activations [B, F] from normalised rows [B, D]."""
        return blas.addmm(self.blas, self.b_enc, x, self.W_enc)

    def positive_sum(self, x: Tensor, times: Tensor) -> Tensor:
        """Return the sum of the positive pre-activations of normalised rows [n, D]; the bias counts `times` [n, 1]."""
        return (x @ self.W_enc + times * self.b_enc).relu().sum()

    def step(
        self,
        source: Tensor,
        target: Tensor,
        dead: Tensor,
        auxk: AuxKConfig,
        step: int,
        whole: bool = False,
        number: Tensor | None = None,
    ) -> StepOutput:
        """Compute the loss of one batch. `dead` [F] bool are the latents that aux-k may use.

        `whole`: a guarded search gives `pre_acts` as well, which costs it time and changes nothing else. `number`: the
        step once more, on the device, for work that is recorded once and done at many steps.
        """
        return self.step_of(*self.normalised(source, target), dead, auxk, step, whole, number)

    def step_of(
        self,
        x: Tensor,
        y: Tensor,
        dead: Tensor,
        auxk: AuxKConfig,
        step: int,
        whole: bool = False,
        number: Tensor | None = None,
    ) -> StepOutput:
        """As `step`, of rows [B, D] and [B, O] that are normalised."""
        pre_acts, active, smallest = self._selected(x, step, whole)
        groups = Groups(self.group, len(self.prefixes), self._weight(len(y), y), self.prefixes)
        if self.joins:
            assert pre_acts is not None, "a guarded search is for the CPU"
            found = joined_losses(self, x, y, pre_acts, active, groups, dead, auxk, step, number)
            return StepOutput(
                losses=tuple(found.terms.values()),
                terms={name: term.detach() for name, term in found.terms.items()},
                errors=found.joined.figures[:, :-2],
                target=y,
                active=found.joined.active,
                values=found.values,
                threshold=smallest,
                pre_acts=pre_acts,
                joined=found.joined,
            )
        gathered = self._ops.encode(x, self.W_enc, self.b_enc, active, again=self.tf32)
        values = self.activation.values(gathered, self.thresholds(), active)
        loss, errors, residual = self._ops.prefix_loss(values, self.W_dec, self.linear_part(x), y, active, groups)
        penalty = self.activation.penalty(gathered, values, self.thresholds(), active, len(x), step)
        terms = {"reconstruction": loss} | penalty
        if auxk.coefficient:
            rows = auxk.rows_at(step if number is None else number, len(x))
            some = None if self.guarded or pre_acts is None else pre_acts[rows]
            terms["auxk"] = self._auxk(x[rows].contiguous(), some, residual[rows].contiguous(), dead, auxk)
        first: Tensor = sum((term for name, term in terms.items() if name in penalty), loss)
        losses = (first, terms["auxk"]) if "auxk" in terms else (first,)
        return StepOutput(
            losses=losses,
            terms={name: term.detach() for name, term in terms.items()},
            errors=errors,
            target=y,
            active=active.with_values(values.detach()),
            values=values,
            threshold=smallest,
            pre_acts=pre_acts,
        )

    def _weight(self, rows: int, like: Tensor) -> Tensor | float:
        """Return what a squared error weighs in the loss of so many rows; kept on the device where terms join it."""
        weight = matryoshka_weight(rows, len(self.prefixes), like.shape[1])
        if not self.joins:
            return weight if self._evenly else weight * self.prefix_shares
        if self._kept_weight is None or self._kept_weight[0] != rows or self._kept_weight[1].device != like.device:
            self._kept_weight = rows, (weight * self.prefix_shares).to(like)
        return self._kept_weight[1]

    def select(self, pre_acts: Tensor, step: int) -> tuple[SparseLatents, Tensor]:
        """Select the pairs that take part in the training step `step`.

        Returns them, and the smallest of their positive pre-activations.
        """
        active, smallest = self.activation.select(self._ops, pre_acts, self.thresholds(), step, self._guess)
        if not self._ops.keeps_guess:
            self._guess.copy_(0.95 * smallest)  # in its place, where a recorded step reads it
        return active, smallest

    def select_final(self, pre_acts: Tensor) -> SparseLatents:
        """Select the pairs that the training rule activates after all warm-ups; changes nothing."""
        return self.activation.select_final(self._ops, pre_acts, self.thresholds(), self._guess.clone())

    def select_above(self, pre_acts: Tensor, thresholds: Tensor) -> SparseLatents:
        """Select the pairs above `thresholds` [F]: the rule of inference."""
        return self._ops.above(pre_acts, thresholds)

    def reconstruct(self, values: Tensor, active: SparseLatents, x: Tensor) -> Tensor:
        """Return every prefix's reconstruction of the normalised targets: [B, P, O]."""
        decoded = plain.decode_prefixes(values, self.W_dec, active, self.group, len(self.prefixes))
        return decoded + self.linear_part(x).unsqueeze(1)

    def reconstruct_whole(self, values: Tensor, active: SparseLatents, x: Tensor) -> Tensor:
        """Return the last prefix's reconstruction alone: [B, O]."""
        whole = plain.decode_prefixes(values, self.W_dec, active, torch.zeros_like(self.group), 1)[:, 0]
        return whole + self.linear_part(x)

    def linear_part(self, x: Tensor) -> Tensor:
        """Return what every prefix's reconstruction starts from: [1, O], or [B, O] with a skip connection."""
        return self.b_dec.unsqueeze(0) if self.W_skip is None else x @ self.W_skip + self.b_dec

    @property
    def joins(self) -> bool:
        """Whether terms can leave gradients that go with those of a step's first loss."""
        return self.kernels == "triton" and self.activation.expected_l0 is not None

    @property
    def _ops(self) -> SparseOps:
        return sparse_ops(self.kernels)

    @torch.no_grad()
    def _selected(self, x: Tensor, step: int, whole: bool) -> tuple[Tensor | None, SparseLatents, Tensor]:
        """Return the pre-activations, where there are all of them, and the selection of a step, as of `select`."""
        if self.guarded is None:
            pre_acts = self._searched(x)
            return pre_acts, *self.select(pre_acts, step)
        n = self.activation.pairs_of_step(step, len(x))
        assert n is not None, "the settings choose a guarded search only where there is a number of pairs"
        active, smallest, found = self.guarded.batch_topk(self.blas, x, self.W_enc, self.b_enc, n, whole)
        return found, active, smallest

    @torch.no_grad()
    def _searched(self, x: Tensor) -> Tensor:
        """Return the pre-activations [B, F] among which a step selects."""
        if self.product_dtype == torch.float32:
            with blas.tf32(self.tf32):
                return self.pre_acts(x)
        b_enc, W_enc = self.low_weights() or (self.b_enc, self.W_enc)
        return torch.addmm(b_enc, x.to(self.product_dtype), W_enc)

    @torch.no_grad()
    def low_weights(self) -> tuple[Tensor, Tensor] | None:
        """Return `b_enc` and `W_enc` in `product_dtype`, where that is a lower one.

        They are cast anew, but where the optimizer has written them beside the weights, and nothing else these since.
        """
        if self.product_dtype == torch.float32:
            return None
        weights, versions = (self.b_enc, self.W_enc), (self.b_enc._version, self.W_enc._version)
        if self._low is None or self._low[0].device != self.b_enc.device:
            self._low = self.b_enc.to(self.product_dtype), self.W_enc.to(self.product_dtype)
        elif not self.low_follows or versions != self._low_of:
            for low, weight in zip(self._low, weights, strict=True):
                low.copy_(weight)
        self._low_of = versions
        return self._low

    def thresholds(self) -> Tensor:
        """Return the learned thresholds [F] of a JumpReLU; 0 for activations that learn none."""
        return self._zeros if self.log_threshold is None else self.log_threshold.exp()

    def _auxk(self, x: Tensor, pre_acts: Tensor | None, residual: Tensor, dead: Tensor, config: AuxKConfig) -> Tensor:
        """Compute the auxiliary loss: the error of predicting the residual from dead latents.

        Dead latents are dead because their pre-activations are negative: they are taken before the ReLU. Without
        `pre_acts`, those of the dead latents are made here.
        """
        if pre_acts is None:
            active = guarded.row_topk(self.blas, x, self.W_enc, self.b_enc, config.active(dead), dead)
        else:
            active = self._ops.row_topk(pre_acts, config.k, dead, config.dead_per_active)
        values = self._ops.encode(x, self.W_enc, self.b_enc, active, again=self.tf32).where(dead[active.latents], 0.0)
        nothing = torch.zeros_like(residual[:1])
        weight = config.coefficient * auxk_weight(residual, dead, config.dead_per_active)
        groups = Groups(torch.zeros_like(self.group), 1, weight, (self.d_sae,))
        return self._ops.prefix_loss(values, self.W_dec, nothing, residual, active, groups)[0]


class _ShapeSettings(Config):
    """Of a run's settings, what its transcoder is made from."""

    model_config = ConfigDict(extra="ignore")
    transcoder: TranscoderConfig
    activation: Activation


class _Shape(Config):
    """The same of `config.json`, which the trainer reads as `RunConfig`."""

    model_config = ConfigDict(extra="ignore")
    settings: _ShapeSettings
    d_in: Width
    d_out: Width
