"""A transcoder as other libraries have it: in the LLM's own units, and with one threshold for each latent.

    h = x @ W_enc + b_enc                  [B, F]
    latents = h where h > threshold, else 0
    y = latents @ W_dec + b_dec [+ x @ W_skip]

Legend: B rows, D d_in, O d_out, F latents.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from train.model.transcoder import Transcoder


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTranscoder:
    """Float32 tensors of one transcoder, and which of its latents are active."""

    W_enc: Tensor
    """[D, F]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, O]"""
    b_dec: Tensor
    """[O]"""
    threshold: Tensor
    """[F], none below 0"""
    W_skip: Tensor | None = None
    """[D, O]"""
    k: int | None = None
    """The k largest latents of every row are active instead, where they are above 0."""

    @classmethod
    @torch.no_grad()
    def of(cls, transcoder: Transcoder, threshold: Tensor, prefix: int | None = None) -> Self:
        """Fold the normalisation of a trained transcoder into its weights, in float64; latent values stay the same.

        `threshold` [F] are those of inference. `prefix`: the first so many latents alone, one of `prefixes`.
        """
        n = prefix or transcoder.d_sae
        mean, scale = transcoder.source_mean.double(), transcoder.source_scale.double()
        out = transcoder.target_scale.double()
        W_enc = transcoder.W_enc[:, :n].double() / scale
        b_enc = transcoder.b_enc[:n].double() - mean @ W_enc
        b_dec = transcoder.b_dec.double() * out + transcoder.target_mean.double()
        W_skip = None
        if transcoder.W_skip is not None:
            W_skip = transcoder.W_skip.double() * out / scale
            b_dec = b_dec - mean @ W_skip
        return cls(
            W_enc=W_enc.float(),
            b_enc=b_enc.float(),
            W_dec=(transcoder.W_dec[:n].double() * out).float(),
            b_dec=b_dec.float(),
            threshold=threshold[:n].float(),
            W_skip=None if W_skip is None else W_skip.float(),
        )

    @torch.no_grad()
    def copy_to(self, transcoder: Transcoder) -> None:
        """Give `transcoder`, of the same shape, weights with which it is this function; the inverse of `of`.

        Its shift and scale stay, and are folded out of the weights in float64. Latent values stay the same. Learned
        thresholds are taken over; one of 0 becomes the least float32 above it.
        """
        assert not transcoder.has_unit_decoder, "the norms of these decoder rows are part of the function"
        mean, scale = transcoder.source_mean.double(), transcoder.source_scale.double()
        W_enc, W_dec = self.W_enc.to(mean), self.W_dec.to(mean)
        b_dec, out = self.b_dec.to(mean) - transcoder.target_mean.double(), transcoder.target_scale.double()
        if self.W_skip is not None and transcoder.W_skip is not None:
            transcoder.W_skip.copy_(self.W_skip.to(mean) * scale / out)
            b_dec = b_dec + mean @ self.W_skip.to(mean)
        transcoder.W_enc.copy_(W_enc * scale)
        transcoder.b_enc.copy_(self.b_enc.to(mean) + mean @ W_enc)
        transcoder.W_dec.copy_(W_dec / out)
        transcoder.b_dec.copy_(b_dec / out)
        if transcoder.log_threshold is not None:
            least = torch.finfo(torch.float32).tiny
            transcoder.log_threshold.copy_(self.threshold.to(mean).clamp_min(least).log())

    def reading_less_b_dec(self) -> "PlainTranscoder":
        """Return the same function without `b_dec` being taken from its input first, as many autoencoders do."""
        return replace(self, b_enc=(self.b_enc.double() - self.b_dec.double() @ self.W_enc.double()).float())

    def with_unit_decoder(self) -> "PlainTranscoder":
        """Return the same function with decoder rows of norm 1: a latent is then its value times its row's norm."""
        norms = self.W_dec.norm(dim=1).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        return replace(
            self,
            W_enc=self.W_enc * norms,
            b_enc=self.b_enc * norms,
            W_dec=self.W_dec / norms.unsqueeze(1),
            threshold=self.threshold * norms,
        )

    def silent(self) -> "PlainTranscoder":
        """Return one of the same shape whose latents are never active, and whose prediction is 0."""
        return PlainTranscoder(
            W_enc=torch.zeros_like(self.W_enc),
            b_enc=torch.zeros_like(self.b_enc),
            W_dec=torch.zeros_like(self.W_dec),
            b_dec=torch.zeros_like(self.b_dec),
            threshold=torch.zeros_like(self.threshold),
            W_skip=None if self.W_skip is None else torch.zeros_like(self.W_skip),
        )

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return len(self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents [B, F] of source rows `x` [B, D], 0 where a latent is not active."""
        h = x @ self.W_enc + self.b_enc
        if self.k is None:
            return h.where(h > self.threshold, 0.0)
        top = h.relu().topk(self.k, dim=1)
        return torch.zeros_like(h).scatter_(1, top.indices, top.values)

    def decode(self, latents: Tensor, x: Tensor) -> Tensor:
        """Return the predicted target rows [B, O]; `x` [B, D] are the source rows, which a skip connection reads."""
        y = latents @ self.W_dec + self.b_dec
        return y if self.W_skip is None else y + x @ self.W_skip
