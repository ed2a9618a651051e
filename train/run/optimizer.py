"""Adam on float32 master weights, the learning rate's schedule, and what happens around a step."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from shared.config import Config
from train.model import shards
from train.model.kernels import numba_loops
from train.model.saved_tensors import fitting
from train.model.schedule import warmup_steps
from train.model.transcoder import Transcoder
from train.model.unit_rows import drop_parallel_part, normalise_rows
from train.parallel.dictionary import Common, Shard, ShardedTranscoder

_VECTORS = ("b_enc", "b_dec")
"""Parameters whose gradients the kernel that clips squares itself"""
_OF_ALL = ("W_dec", "b_dec", "W_enc", "b_enc")
"""Parameters of every transcoder, which one kernel moves"""
_LR, _LR_WIDTH, _DECODER_RATE = 5.6e-3, 576, 4.0


class OptimizerConfig(Config):
    """Adam (Kingma and Ba 2015) with linear warm-up and a linear decay to zero."""

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = 3e-4
    """Learning rate between warm-up and decay. `auto`: 0.0056 for d_in up to 576, measured at 576; above that
    0.0056 * 576 / d_in, which was not measured (decisions/010)."""
    decoder_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """The learning rate of `W_dec` divided by `lr`. Decoder rows of norm 1 train best at 4 to 8 times the encoder's
    rate (decisions/010). `auto`: 4 for norm 1, and 1 for free norms."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the rate rises linearly from 0; none: use `warmup_share`."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; used if `warmup_steps` is not set."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """Share of the run, at its end, over which the rate falls linearly to 0."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are clipped to this global norm; none: never."""

    def resolve(self, steps: int, d_in: int, unit_decoder: bool) -> "OptimizerConfig":
        """Return the same with numbers, for a run of so many steps. Raises `UserError` when they do not fit."""
        warmup = warmup_steps("optimizer.warmup", self.warmup_steps, self.warmup_share, steps)
        lr = float(f"{_LR * min(1.0, _LR_WIDTH / d_in):.3g}") if self.lr == "auto" else self.lr
        rate = self.decoder_rate
        if rate == "auto":
            rate = _DECODER_RATE if unit_decoder else 1.0
        return self.model_copy(update={"warmup_steps": warmup, "lr": lr, "decoder_rate": rate})

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, in a run of `steps`."""
        assert self.lr != "auto", "resolve the configuration first"
        rise = min(1.0, (step + 1) / ((self.warmup_steps or 0) + 1))
        decay = self.decay_share * steps
        return self.lr * rise * (min(1.0, (steps - step) / decay) if decay else 1.0)

    def rate_of(self, parameter: str) -> float:
        """Return the learning rate of a parameter over `lr`."""
        assert self.decoder_rate != "auto", "resolve the configuration first"
        return self.decoder_rate if parameter == "W_dec" else 1.0


class Optimizer:
    """One step of Adam with clipping before it, and after it decoder rows of norm 1 where they are to have it."""

    def __init__(
        self,
        transcoder: Transcoder | ShardedTranscoder,
        config: OptimizerConfig,
        length_at: Callable[[int], int],
    ) -> None:
        """Set up the optimizer. `length_at`: how many steps the run has, by the step that is trained."""
        self._transcoder, self._config, self._length_at = transcoder, config, length_at
        self._one: Tensor | None = None
        """What each backward starts from, made once"""
        self._adam: CompiledAdam | ShardedAdam | TritonAdam | TorchAdam
        if isinstance(transcoder, ShardedTranscoder):
            self._adam = ShardedAdam(transcoder, config)
        elif transcoder.kernels == "compiled":
            self._adam = CompiledAdam(transcoder, config)
        elif transcoder.kernels == "triton":
            self._adam = TritonAdam(transcoder, config)
        else:
            self._adam = TorchAdam(transcoder, config)

    def step(self, losses: Sequence[Tensor], step: int) -> tuple[float, Tensor]:
        """Run backward, one loss after the other, and update.

        Returns the learning rate and the gradients' norm before clipping.
        """
        return self.begin(step), self.update(losses)

    def begin(self, step: int) -> float:
        """Set the learning rate of `step`, and return it."""
        lr = self._config.lr_at(step, self._length_at(step))
        self._adam.set_rate(lr)
        return lr

    def update(self, losses: Sequence[Tensor]) -> Tensor:
        """Run backward, one loss after the other, and update by the rate that was set; returns the gradients' norm.

        The first loss should be the one that reaches every latent: it writes gradients, and those after it add to them.
        """
        self._transcoder.zero_grad(set_to_none=True)
        if self._one is None:
            self._one = torch.ones_like(losses[0])
        for loss in losses:
            loss.backward(self._one)
        return self._adam.update(self._config.max_grad_norm or float("inf"))

    @torch.no_grad()
    def start_anew(self, latents: Tensor) -> None:
        """Give `latents` [n] int64 the moments of new ones: no direction, and steps as long as others' are on average.

        With second moments of 0, their first steps would be up to six times as long, as Adam's corrections are past.
        """
        self._adam.start_anew(latents)

    def state(self) -> dict[str, Tensor]:
        """Return Adam's state by `<parameter>.<name>`."""
        return self._adam.state()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        self._adam.load(tensors)


class TorchAdam:
    """Adam in torch's fused kernel."""

    def __init__(self, transcoder: Transcoder | Shard | Common, config: OptimizerConfig) -> None:
        self._transcoder = transcoder
        self._unit = None if isinstance(transcoder, Common) or not transcoder.has_unit_decoder else transcoder.W_dec
        self._adam = torch.optim.Adam(
            [{"params": [p], "times": config.rate_of(name)} for name, p in transcoder.named_parameters()],
            lr=1.0,  # set at every step
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the updates that follow."""
        for group in self._adam.param_groups:
            group["lr"] = lr * group["times"]

    def update(self, limit: float) -> Tensor:
        """Move the parameters by their gradients; returns the gradients' norm, which is scaled down to `limit`."""
        self._drop_parallel_part()
        norm = nn.utils.clip_grad_norm_(self._transcoder.parameters(), limit)
        self._step()
        return norm

    def measure(self) -> float:
        """As `CompiledAdam.measure`. Waits for the device."""
        self._drop_parallel_part()
        grads = [parameter.grad for parameter in self._transcoder.parameters()]
        return float(sum(grad.double().square().sum() for grad in grads if grad is not None))

    @torch.no_grad()
    def move(self, scale: float) -> None:
        """As `CompiledAdam.move`."""
        for parameter in self._transcoder.parameters():
            assert parameter.grad is not None
            parameter.grad *= scale
        self._step()

    def _drop_parallel_part(self) -> None:
        if self._unit is not None:
            assert self._unit.grad is not None
            drop_parallel_part(self._unit.grad, self._unit)

    def _step(self) -> None:
        self._adam.step()
        if self._unit is not None:
            normalise_rows(self._unit)  # after the step: what is saved has unit norm

    def start_anew(self, latents: Tensor) -> None:
        """As `Optimizer.start_anew`."""
        for name, parameter in self._transcoder.named_parameters():
            state = self._adam.state[parameter]
            _start_anew(name, state["exp_avg"], state["exp_avg_sq"], latents)

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer.state`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._transcoder.named_parameters()
            for key, value in self._adam.state[parameter].items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As `Optimizer.load`."""
        for name, parameter in self._transcoder.named_parameters():
            state = self._adam.state[parameter]
            state["step"] = fitting(tensors, f"{name}.step", torch.zeros(())).to(parameter.device, copy=True)
            for key in ("exp_avg", "exp_avg_sq"):  # as the parameter lies in memory, which a file does not keep
                state[key] = torch.empty_like(parameter).copy_(fitting(tensors, f"{name}.{key}", parameter))


class CompiledAdam:
    """The same in two passes over the rows of each parameter: norms, then everything else."""

    def __init__(self, transcoder: Transcoder | Shard | Common, config: OptimizerConfig) -> None:
        self._transcoder, self._config, self._count, self._lr = transcoder, config, 0, 0.0
        self._measured: list[tuple[list[NDArray[Any]], NDArray[Any], bool, float]] = []
        self._moments = {
            name: (torch.zeros_like(parameter), torch.zeros_like(parameter))
            for name, parameter in transcoder.named_parameters()
        }

    def set_rate(self, lr: float) -> None:
        """As `TorchAdam.set_rate`."""
        self._lr = lr

    def update(self, limit: float) -> Tensor:
        """As `TorchAdam.update`."""
        norm = self.measure() ** 0.5
        self.move(min(1.0, limit / (norm + 1e-6)))
        return torch.tensor(norm)

    @torch.no_grad()
    def measure(self) -> float:
        """Return the gradients' squared norm, of unit rows without the part along them; `move` follows."""
        self._measured, square = [], 0.0
        for name, parameter in self._transcoder.named_parameters():
            assert parameter.grad is not None
            rows = [_rows(tensor) for tensor in (parameter, parameter.grad, *self._moments[name])]
            unit = name == "W_dec" and self._transcoder.has_unit_decoder
            along, squares = np.empty(len(rows[0]), rows[0].dtype), np.empty(len(rows[0]), np.float64)
            numba_loops.row_squares(rows[1], rows[0], unit, along, squares)
            square += float(squares.sum())
            self._measured.append((rows, along, unit, self._config.rate_of(name)))
        return square

    def move(self, scale: float) -> None:
        """Move the parameters by their gradients, `scale` times these."""
        self._count += 1
        c = self._config
        corrections = 1 - c.beta1**self._count, 1 - c.beta2**self._count
        for rows, along, unit, times in self._measured:
            numba_loops.adam(*rows, along, unit, scale, self._lr * times, c.beta1, c.beta2, c.eps, *corrections)
        self._measured = []

    def start_anew(self, latents: Tensor) -> None:
        """As `Optimizer.start_anew`."""
        for name, moments in self._moments.items():
            _start_anew(name, *moments, latents)

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer.state`."""
        found: dict[str, Tensor] = {}
        for name, (first, second) in self._moments.items():
            step = torch.tensor(float(self._count))
            found |= {f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second, f"{name}.step": step}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As `Optimizer.load`."""
        for name, (first, second) in self._moments.items():
            first.copy_(fitting(tensors, f"{name}.exp_avg", first))
            second.copy_(fitting(tensors, f"{name}.exp_avg_sq", second))
            self._count = int(fitting(tensors, f"{name}.step", torch.zeros(())))


class ShardedAdam:
    """The same by shard; the gradients' norm is of all shards, their squares added in order."""

    def __init__(self, model: ShardedTranscoder, config: OptimizerConfig) -> None:
        self._model = model
        adam = CompiledAdam if model.whole.kernels == "compiled" else TorchAdam
        self._common = adam(model.common, config)
        self._parts = [adam(one, config) for one in model.parts]

    def set_rate(self, lr: float) -> None:
        """As `TorchAdam.set_rate`."""
        for one in (self._common, *self._parts):
            one.set_rate(lr)

    def update(self, limit: float) -> Tensor:
        """As `TorchAdam.update`."""
        self._model.take_gradients()
        own = torch.tensor([one.measure() for one in self._parts], dtype=torch.float64)
        norm = (self._common.measure() + sum(self._model.ranks.gathered(own).tolist())) ** 0.5
        for one in (self._common, *self._parts):
            one.move(min(1.0, limit / (norm + 1e-6)))
        return torch.tensor(norm)

    def start_anew(self, latents: Tensor) -> None:
        """As `Optimizer.start_anew`, of the latents of each shard."""
        for shard, one in zip(self._model.parts, self._parts, strict=True):
            one.start_anew(latents[latents % self._model.shards == shard.number] // self._model.shards)

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer.state`, of all shards, in every process: all must ask for it."""
        own = [one.state() for one in self._parts]
        found = self._common.state()
        for name in own[0]:
            if name.endswith(".step"):
                found[name] = own[0][name]
                continue
            turned = name.startswith("W_enc.")
            parts = torch.stack([one[name].T if turned else one[name] for one in own])
            every = shards.woven(self._model.ranks.gathered(parts))
            found[name] = every.T if turned else every
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As `Optimizer.load`, of the tensors of all shards."""
        self._common.load(tensors)
        _, parts = shards.deal(tensors, self._model.shards)
        for shard, one in zip(self._model.parts, self._parts, strict=True):
            one.load(tensors | parts[shard.number])


class TritonAdam:
    """The same in Triton kernels: in one pass over rows, where the kernels that write gradients note their norms.

    They write the encoder's weights in bfloat16, too, where a step reads it.

    The rate and all that depends on the step are on the device.
    """

    def __init__(self, transcoder: Transcoder, config: OptimizerConfig) -> None:
        from train.model.kernels import triton_adam  # not there without CUDA

        self._kernels, self._transcoder, self._config = triton_adam, transcoder, config
        self._parameters = dict(transcoder.named_parameters())
        self._moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self._parameters.items()}
        device, betas = transcoder.W_dec.device, (config.beta1, config.beta2)
        self._count = torch.zeros((), device=device)
        self._powers = torch.tensor([1.0, 1.0, *betas], dtype=torch.float64).to(device)
        self._scalars = torch.zeros(5, device=device)
        """The rate, the gradients' norm, their scale, and Adam's two corrections."""
        self._places = [0, *accumulate(triton_adam.rows_of(p) for p in self._parameters.values())]
        self._squares = torch.zeros(self._places[-1], device=device)
        """The squared norm of every gradient's rows"""
        transcoder.low_follows = True

    def set_rate(self, lr: float) -> None:
        """As `TorchAdam.set_rate`."""
        self._scalars[0].fill_(lr)

    @torch.no_grad()
    def update(self, limit: float) -> Tensor:
        """As `TorchAdam.update`; the norm is overwritten at the next step."""
        c, model, kernels, parts = self._config, self._transcoder, self._kernels, dict(self._rows())
        noted = []
        for name, (rows, grad, place) in parts.items():
            known = model.gradient_norms.get(name)
            if known and known.holds_for(self._parameters[name].grad):
                noted.append((known.parts, self._squares[place]))
            elif name not in _VECTORS:
                kernels.row_squares(grad, rows, self._unit(name), self._squares[place])
        if noted:
            kernels.noted_squares(noted)
        model.gradient_norms.clear()
        vectors = [parts[name][1] for name in _VECTORS]
        kernels.clip(self._squares, *vectors, limit, self._powers, self._count, self._scalars)
        low = dict(zip(("b_enc", "W_enc"), model.low_weights() or (None, None), strict=True))
        moved = {name: kernels.Moved(*part[:2], *self._moments[name], low.get(name)) for name, part in parts.items()}
        numbers = {"betas": (c.beta1, c.beta2), "eps": c.eps}
        of_all, unit = [moved.pop(name) for name in _OF_ALL], self._unit("W_dec")
        kernels.adam_of_all(*of_all, self._scalars, unit=unit, times=c.rate_of("W_dec"), **numbers)
        for name, one in moved.items():
            kernels.adam(one, self._scalars, times=c.rate_of(name), **numbers)
        return self._scalars[1]

    def _rows(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, slice]]]:
        """Yield by name weights, gradient and place among the rows of all parameters."""
        for (name, parameter), place in zip(self._parameters.items(), pairwise(self._places), strict=True):
            grad = parameter.grad
            assert grad is not None and grad.stride() == parameter.stride(), name
            yield name, (parameter.detach(), grad, slice(*place))

    def _unit(self, name: str) -> bool:
        return name == "W_dec" and self._transcoder.has_unit_decoder

    def start_anew(self, latents: Tensor) -> None:
        """As `Optimizer.start_anew`."""
        for name, moments in self._moments.items():
            _start_anew(name, *moments, latents)

    def state(self) -> dict[str, Tensor]:
        """As `Optimizer.state`."""
        found: dict[str, Tensor] = {}
        for name, (first, second) in self._moments.items():
            found |= {f"{name}.exp_avg": first, f"{name}.exp_avg_sq": second, f"{name}.step": self._count.clone()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As `Optimizer.load`."""
        for name, (first, second) in self._moments.items():
            first.copy_(fitting(tensors, f"{name}.exp_avg", first))
            second.copy_(fitting(tensors, f"{name}.exp_avg_sq", second))
            self._count.copy_(fitting(tensors, f"{name}.step", self._count))
        betas = torch.tensor([self._config.beta1, self._config.beta2], dtype=torch.float64)
        powers = torch.ones(2, dtype=torch.float64)
        for _ in range(int(self._count)):  # as the steps before have multiplied them, bit for bit
            powers *= betas
        self._powers.copy_(torch.cat([powers, betas]))


def _start_anew(name: str, first: Tensor, second: Tensor, latents: Tensor) -> None:
    """Give `latents` [n] in the moments of a parameter no first moment, and as a second one the mean of all."""
    dim = {**shards.PER_LATENT, "log_threshold": 0}.get(name)
    if dim is not None and len(latents):
        first.movedim(dim, 0)[latents] = 0
        second.movedim(dim, 0)[latents] = second.mean(dim)


def _rows(tensor: Tensor) -> NDArray[Any]:
    """Return a parameter, its gradient or a moment as rows that lie one after the other in memory."""
    tensor = tensor.detach()
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    elif not tensor.is_contiguous():
        tensor = tensor.T
    assert tensor.is_contiguous()
    return tensor.numpy()
