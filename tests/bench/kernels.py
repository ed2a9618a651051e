"""What the sparse operations of a step cost beside the obvious ones, side by side in one process.

python -m tests.bench.kernels             writes docs/benchmarks.json and docs/benchmarks.md
"""

import statistics
import time
from collections.abc import Callable

import torch

from tests.bench.record import record, sized
from train.model.kernels import plain
from train.model.kernels.sparse_ops import sparse_ops
from train.model.sparse_latents import offsets

B, D, F, K = sized((1024, 128, 4096, 32), (64, 16, 128, 4))
PREFIXES = tuple(F // n for n in (16, 8, 4, 2, 1))
REPEATS = sized(15, 2)


def main() -> None:
    """Measure on one thread and record medians of interleaved repeats."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(*shape, generator=generator) for shape in ((B, D), (D, F), (F, D)))
    pre_acts = x @ W_enc
    compiled = sparse_ops("compiled")
    active, threshold = compiled.batch_topk(pre_acts, K * B, torch.zeros(()))
    values = active.values
    group_of = torch.bucketize(torch.arange(F), torch.tensor(PREFIXES), right=True)
    group = active.rows * len(PREFIXES) + group_of[active.latents]
    starts = offsets(group, B * len(PREFIXES))
    grad = torch.randn(B * len(PREFIXES), D, generator=generator)
    order, by_latent = active.by_latent

    def encoder() -> torch.Tensor:
        return torch.addmm(torch.zeros(F), x, W_enc)

    def values_by_gather() -> torch.Tensor:
        return (grad[group] * W_dec[active.latents]).sum(1)

    def values_by_sampled_product() -> torch.Tensor:
        return plain._sampled_product(grad, W_dec, starts, active.latents)

    def weights_by_index_add() -> torch.Tensor:
        return torch.zeros(F, D).index_add_(0, active.latents, grad[group] * values.unsqueeze(1))

    def weights_by_sorted_bag() -> torch.Tensor:
        return plain._bag(group[order], grad, by_latent, values[order])

    def select_by_sort() -> torch.Tensor:
        return pre_acts.view(-1).topk(K * B, sorted=False).indices

    def select_by_threshold() -> torch.Tensor:
        return compiled.batch_topk(pre_acts, K * B, 0.95 * threshold)[0].rows

    torch.testing.assert_close(values_by_gather(), values_by_sampled_product(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weights_by_index_add(), weights_by_sorted_bag(), rtol=1e-3, atol=1e-3)
    assert len(select_by_sort()) == len(select_by_threshold())
    measured = interleaved(
        encoder,
        values_by_gather,
        values_by_sampled_product,
        weights_by_index_add,
        weights_by_sorted_bag,
        select_by_sort,
        select_by_threshold,
    )
    figures = {f"{name.replace('_', ' ')}": (seconds * 1e3, "ms") for name, seconds in measured.items()}
    record(f"kernels: B {B}, d {D}, d_sae {F}, k {K}, one thread", "python -m tests.bench.kernels", figures)


def interleaved(*functions: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Median seconds of each function, taking turns."""
    taken: dict[str, list[float]] = {function.__name__: [] for function in functions}
    for repeat in range(REPEATS + 1):
        for function in functions:
            began = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                taken[function.__name__].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
