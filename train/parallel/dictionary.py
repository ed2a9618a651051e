"""A transcoder whose dictionary is cut into virtual shards, some of them here: the training step of all.

Each process holds the weights of its shards, and beside them the whole transcoder, whose rows are brought up to date
when they are read: for evaluation, reports and checkpoints all, for mined pairs those of the pairs. Everything that
does not belong to a latent (rows, biases of the output, the skip connection, the loss) every process computes alike.
Legend: B rows, D d_in, O d_out, F latents, V shards, P prefixes, N pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.model import blas
from train.model.kernels.base import Groups, has_gradient, weighted
from train.model.kernels.fused import Fused
from train.model.kernels.sparse_ops import sparse_ops
from train.model.losses import AuxKConfig, auxk_weight, matryoshka_weight
from train.model.shards import latents_of, part, woven
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.transcoder import Transcoder
from train.parallel.ranks import Ranks
from train.parallel.required import mine
from train.parallel.select import candidates, histogram


class Shard(nn.Module):
    """The weights of one virtual shard. Its latents are numbered from 0 here, in the order of their own numbers."""

    def __init__(self, whole: Transcoder, shard: int, shards: int) -> None:
        super().__init__()
        self.number, self.has_unit_decoder = shard, whole.has_unit_decoder
        self.latents = latents_of(shard, shards, whole.d_sae).to(whole.W_dec.device)
        """[F / V] int64, their own numbers"""
        self.group = whole.group[self.latents]
        d_in, d_out = whole.W_enc.shape[0], whole.W_dec.shape[1]
        device, size = whole.W_dec.device, len(self.latents)
        self.W_enc = nn.Parameter(torch.zeros(size, d_in, device=device).T)
        self.b_enc = nn.Parameter(torch.zeros(size, device=device))
        self.W_dec = nn.Parameter(torch.zeros(size, d_out, device=device))


class Common(nn.Module):
    """The weights that belong to no latent: every process has them, and moves them alike."""

    has_unit_decoder = False

    def __init__(self, whole: Transcoder) -> None:
        super().__init__()
        self.b_dec, self.W_skip = whole.b_dec, whole.W_skip


@dataclass(frozen=True, slots=True)
class Selected:
    """Selected pairs of this process's shards, and where each lies in a vector of values."""

    active: list[SparseLatents]
    """By shard, latents numbered in the shard"""
    places: list[Tensor]
    """By shard, [N of the shard] int64"""


class ShardedTranscoder:
    """Trains `whole` by its shards, as `Transcoder.step` does without."""

    def __init__(self, whole: Transcoder, shards: int, ranks: Ranks) -> None:
        """Cut `whole`; its weights are taken by `take`."""
        self.whole, self.shards, self.ranks = whole, shards, ranks
        self.parts = [Shard(whole, number, shards) for number in mine(shards, ranks.rank, ranks.size)]
        self.common = Common(whole)
        ops = sparse_ops(whole.kernels)
        assert isinstance(ops, Fused), "the settings choose kernels that have the loops"
        self.ops = ops
        self._guess = 0.0

    @torch.no_grad()
    def take(self) -> None:
        """Take the weights of the whole transcoder of the first process."""
        for tensor in self.whole.state_dict().values():
            lies = tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
            self.ranks.from_first(lies)
        for one in self.parts:
            for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
                getattr(one, name).copy_(part(getattr(self.whole, name), dim, one.number, self.shards))

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring all weights of the whole transcoder up to date, in every process."""
        whole = self.whole
        whole.W_enc.T.copy_(woven(self.ranks.gathered(torch.stack([one.W_enc.T for one in self.parts]))))
        whole.b_enc.copy_(woven(self.ranks.gathered(torch.stack([one.b_enc for one in self.parts]))))
        whole.W_dec.copy_(woven(self.ranks.gathered(torch.stack([one.W_dec for one in self.parts]))))

    @torch.no_grad()
    def refresh_decoder(self, latents: Tensor) -> None:
        """Bring the decoder rows of `latents` [n], without repeats and rising, up to date in every process."""
        if not len(latents):
            return
        of_shard = [latents[latents % self.shards == v] for v in range(self.shards)]
        most = max(len(some) for some in of_shard)
        rows = self.whole.W_dec.new_zeros(len(self.parts), most, self.whole.W_dec.shape[1])
        for one, room in zip(self.parts, rows, strict=True):
            wanted = of_shard[one.number]
            torch.index_select(one.W_dec, 0, wanted // self.shards, out=room[: len(wanted)])
        for wanted, found in zip(of_shard, self.ranks.gathered(rows), strict=True):
            self.whole.W_dec[wanted] = found[: len(wanted)]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add what terms of decoder rows have left at the whole transcoder to the gradients of the shards."""
        grad, self.whole.W_dec.grad = self.whole.W_dec.grad, None
        for one in self.parts if grad is not None else ():
            assert grad is not None and one.W_dec.grad is not None
            one.W_dec.grad += part(grad, 0, one.number, self.shards)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for module in (self.whole, *self.parts):
            module.zero_grad(set_to_none)

    def positive_sum(self, x: Tensor, times: Tensor) -> Tensor:
        """As `Transcoder.positive_sum`."""
        own = torch.stack([(x @ one.W_enc + times * one.b_enc).relu().sum() for one in self.parts])
        return _SumOfAll.apply(own, self.ranks)

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
        """As `Transcoder.step`; `pre_acts` of the result are there where they are wanted `whole`."""
        assert number is None, "a step of shards is no graph"
        model = self.whole
        x, y = model.normalised(source, target)
        n = model.activation.pairs_of_step(step, len(x))
        assert n is not None, "the settings allow only activations with a number of pairs"
        with torch.no_grad():
            pre_acts = [blas.addmm(model.blas, one.b_enc, x, one.W_enc) for one in self.parts]
            selected, active, smallest = self._batch_topk(pre_acts, n)
            every = woven(self.ranks.gathered(torch.stack(pre_acts)).transpose(1, 2)).T if whole else None
        gathered = _Encode.apply(model.b_dec, self, x, selected, active.values)
        values = model.activation.values(gathered, model.thresholds(), active)
        weight = matryoshka_weight(len(y), len(model.prefixes), y.shape[1]) * model.prefix_shares
        base = model.linear_part(x)
        loss, errors, residual = _PrefixLoss.apply(values, base, self, y, selected, weight)
        terms, losses = {"reconstruction": loss}, [loss]
        if auxk.coefficient:
            rows = slice(step % auxk.row_stride, None, auxk.row_stride)
            some = [one[rows] for one in pre_acts]
            terms["auxk"] = self._auxk(x[rows].contiguous(), some, residual[rows].contiguous(), dead, auxk)
            losses.append(terms["auxk"])
        return StepOutput(
            losses=tuple(losses),
            terms={name: term.detach() for name, term in terms.items()},
            errors=errors,
            target=y,
            active=active.with_values(values.detach()),
            values=values,
            threshold=smallest,
            pre_acts=every,
        )

    def _batch_topk(self, pre_acts: list[Tensor], n: int) -> tuple[Selected, SparseLatents, Tensor]:
        """Select the `n` largest of the positive pre-activations of all shards, and those equal to the smallest.

        Returns those of this process's shards, those of all, and the smallest. Histograms of all shards say above which
        value the shards send their pairs: little more than `n`.
        """
        for floor in (self._guess, 0.0) if self._guess else (0.0,):
            found = [self.ops.above(one, one.new_full((one.shape[1],), floor)) for one in pre_acts]
            counts = self.ranks.gathered(torch.stack([histogram(one.values) for one in found]))
            if (count := int(counts.sum())) >= n:
                break
        edge, most = candidates(counts, min(n, count))
        return self._largest([_kept(one, one.values >= edge) for one in found], min(n, count), most)

    def _largest(self, own: list[SparseLatents], n: int, most: int) -> tuple[Selected, SparseLatents, Tensor]:
        """Return the `n` largest pairs of all shards, as `_batch_topk`; `own` of each shard here has at most `most`.

        Rows rise in the pairs of all, and latents within them.
        """
        V, F = self.shards, self.whole.d_sae
        sent = own[0].rows.new_zeros(len(own), 3, most, dtype=torch.int32)
        for active, room in zip(own, sent, strict=True):
            pairs = torch.stack([active.rows.int(), active.latents.int(), active.values.view(torch.int32)])
            room[:, : pairs.shape[1]] = pairs
        rows, latents, bits = self.ranks.gathered(sent).unbind(1)
        values = bits.contiguous().view(torch.float32)
        smallest = values.flatten().kthvalue(values.numel() - n + 1).values if n else values.new_zeros(())
        shards, among = (values >= smallest).nonzero(as_tuple=True)
        keys = rows[shards, among].long() * F + latents[shards, among] * V + shards
        keys, order = keys.sort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        by_shard = place.split(torch.bincount(shards, minlength=V).tolist())
        shape = torch.Size((len(own[0].starts) - 1, F))
        active = SparseLatents.of(keys // F, keys % F, values[shards, among][order], shape)
        self._guess = 0.95 * float(smallest)
        kept = [_kept(one, one.values >= smallest) for one in own]
        return Selected(kept, [by_shard[one.number] for one in self.parts]), active, smallest

    def _auxk(self, x: Tensor, pre_acts: list[Tensor], residual: Tensor, dead: Tensor, config: AuxKConfig) -> Tensor:
        """As `Transcoder._auxk`: of all dead latents, those with the largest pre-activations of each row."""
        if not bool(dead.any()):
            return residual.new_zeros(()).requires_grad_()
        with torch.no_grad():
            found, k = [], config.active(dead)
            for one, some in zip(self.parts, pre_acts, strict=True):
                among = part(dead, 0, one.number, self.shards).contiguous()
                found.append(_kept(active := self.ops.row_topk(some, k, among), among[active.latents]))
            room = residual.new_full((len(found), len(x), k), -torch.inf)
            places = [active.rows * k + _within(active) for active in found]
            for active, place, row in zip(found, places, room.view(len(found), -1), strict=True):
                row[place] = active.values
            among = self._largest_of_rows(self.ranks.gathered(room), k)
            own = [
                _kept(active, among[one.number].flatten()[place])
                for one, active, place in zip(self.parts, found, places, strict=True)
            ]
        flat = torch.cat([active.values for active in own])
        counts = [len(active.values) for active in own]
        selected = Selected(own, list(torch.arange(len(flat), device=flat.device).split(counts)))
        values = _Encode.apply(self.whole.b_dec, self, x, selected, flat)
        weight = (config.coefficient * auxk_weight(residual, dead, config.dead_per_active)).view(1)
        return _PrefixLoss.apply(values, torch.zeros_like(residual[:1]), self, residual, selected, weight)[0]

    def _largest_of_rows(self, values: Tensor, k: int) -> Tensor:  # [V, B, n], [V, B, n] bool
        """Tell which `values` are among the k largest of their row over all shards; what is -inf is not there."""
        shards, rows, width = values.shape
        flat = values.transpose(0, 1).reshape(rows, shards * width)
        top = self.ops.row_topk(flat, k)
        among = torch.zeros_like(flat, dtype=torch.bool)
        among[top.rows, top.latents] = top.values > -torch.inf
        return among.view(rows, shards, width).transpose(0, 1)

    def decoded(self, values: Tensor, selected: Selected, prefixes: int) -> tuple[Tensor, slice]:  # [B, P, O]
        """Return a table of the sums of decoder rows for each row's groups, over all shards, and its valid rows.

        Those are this process's part of the batch. `Ranks.spread` brings the other rows.
        """

        def added(low: int, high: int) -> Tensor:
            if high - low > 1:
                middle = (low + high) // 2
                return added(low, middle).add_(added(middle, high))
            one, active = self.parts[low], selected.active[low]
            rows = len(active.starts) - 1
            out = values.new_empty(rows * prefixes, one.W_dec.shape[1])
            # The pairs with rows and latents exchanged: sums by latent are then sums by a row's group.
            turned = SparseLatents(active.latents, self.slots(low, active, prefixes), values, active.starts, len(out))
            self.ops.sums_by_latent(turned, values[selected.places[low]], one.W_dec.detach(), out, add=False)
            return out.view(rows, prefixes, -1)

        table = added(0, len(self.parts))
        return table, self.ranks.add(table)

    def slots(self, number: int, active: SparseLatents, prefixes: int) -> Tensor:  # [N]
        """Return the place of each pair's row and group in a table of both."""
        return active.rows * prefixes + self.parts[number].group[active.latents] if prefixes > 1 else active.rows


class _Encode(torch.autograd.Function):
    """Values of selected pairs; the gradient reaches the encoders of the shards here."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, model: ShardedTranscoder, x: Tensor, selected: Selected, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.model, ctx.selected = model, selected
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        for one, active, places in zip(ctx.model.parts, ctx.selected.active, ctx.selected.places, strict=True):
            if one.b_enc.grad is None:
                one.b_enc.grad = torch.zeros_like(one.b_enc)
            add = has_gradient(one.W_enc)
            ctx.model.ops.sums_by_latent(active, grad[places], x, one.W_enc.grad.T, add=add, alone=one.b_enc.grad)
        return (None,) * 5


class _PrefixLoss(torch.autograd.Function):
    """As `SparseOps.prefix_loss`, for the pairs of all shards; the gradient reaches those of the shards here."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, base: Tensor, model: ShardedTranscoder, y: Tensor, selected: Selected, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        meet, own = model.decoded(values, selected, len(weight))
        errors = meet.new_empty(meet.shape[:2])
        residual = meet[own].cumsum_(1)
        residual += ((base[own] if len(base) > 1 else base) - y[own]).unsqueeze(1)
        errors[own] = residual.square().sum(2)
        residual *= 2 * weight.unsqueeze(1)
        for p in range(len(weight) - 2, -1, -1):
            residual[:, p] += residual[:, p + 1]
        model.ranks.spread(meet, errors)
        left = meet[:, -1] / (-2 * weight[-1])
        ctx.save_for_backward(values, meet)
        ctx.model, ctx.selected, ctx.every_row = model, selected, len(base) > 1
        ctx.mark_non_differentiable(errors, left)
        return weighted(errors, weight), errors, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, meet), (times, *_), model = ctx.saved_tensors, grads, ctx.model
        prefixes, table, found = meet.shape[1], meet.flatten(0, 1), torch.zeros_like(values)
        for i, one in enumerate(model.parts):
            active, places = ctx.selected.active[i], ctx.selected.places[i]
            slots = SparseLatents(model.slots(i, active, prefixes), active.latents, values, active.starts, active.d_sae)
            nothing = torch.zeros_like(one.b_enc)
            found[places] = times * model.ops.products(slots, table, one.W_dec.detach(), nothing)
            groups = Groups(one.group if prefixes > 1 else torch.zeros_like(one.group), prefixes, 1.0)
            add = has_gradient(one.W_dec)
            model.ops.sums_by_latent(active, values[places], table, one.W_dec.grad, add=add, groups=groups, times=times)
        grad_base = None
        if ctx.needs_input_grad[1]:
            grad_base = times * (meet[:, 0] if ctx.every_row else meet[:, 0].sum(0, keepdim=True))
        return found, grad_base, *(None,) * 4


class _SumOfAll(torch.autograd.Function):
    """The sum of every shard's number, in order; the gradient reaches those of the shards here."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.count = len(own)
        return own.new_tensor(sum(ranks.gathered(own).tolist()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].expand(ctx.count), None


def _kept(active: SparseLatents, wanted: Tensor) -> SparseLatents:
    """Return the pairs that `wanted` [N] bool names."""
    kept = wanted.nonzero().squeeze(1)
    shape = torch.Size((len(active.starts) - 1, active.d_sae))
    return SparseLatents.of(active.rows[kept], active.latents[kept], active.values[kept], shape)


def _within(active: SparseLatents) -> Tensor:
    """Return the number of each pair among those of its row, [N]."""
    return torch.arange(len(active.rows), device=active.rows.device) - active.starts[active.rows]
