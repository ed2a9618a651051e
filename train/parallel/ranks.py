"""The processes of one training, as `torchrun` starts them; without it there is one.

What they exchange is the same in each afterwards: integers are summed, floats are added in one order whatever the
number of processes, or are put side by side in order of shard. Each holds as many shards as the others, in order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from shared.errors import ProjectError, UserError

_PATIENCE = timedelta(days=1)  # the first evaluates while the others wait, and a dead process is noticed at once


class Ranks:
    """This process among those of the training; not joined to the others before `join`."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def join(self) -> None:
        """Join the other processes, over gloo, and NCCL for what is on CUDA; returns when all have."""
        if self.size > 1:
            import torch.distributed as dist

            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(self.local_rank)  # the device `cuda` is from here on that one
            with self._together():
                dist.init_process_group(backend, timeout=_PATIENCE)

    def leave(self) -> None:
        """Leave the other processes: nothing is exchanged from here on."""
        import torch.distributed as dist

        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of integers over all processes."""
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(counts)
        return counts

    def any(self, flag: bool) -> bool:
        """Tell whether a process says so."""
        return bool(self.total(torch.tensor([int(flag)])))

    def added(self, part: Tensor) -> Tensor:
        """Return the sum of every process's part, by pairs: the first two, the next two, ..., and their sums so again.

        The part of a process is the sum of its shards', made so as well. So the sum is that of one process, which has
        all shards. `part` is written over.
        """
        if self.size > 1:
            import torch.distributed as dist

            other = torch.empty_like(part)
            for far in (1 << i for i in range(self.size.bit_length() - 1)):
                peer = self.rank ^ far
                with self._together():
                    pending = dist.batch_isend_irecv(
                        [dist.P2POp(dist.isend, part, peer), dist.P2POp(dist.irecv, other, peer)]
                    )
                    for one in pending:
                        one.wait()
                part += other  # of two numbers the sum is the same in either order
        return part

    def gathered(self, parts: Tensor) -> Tensor:  # [own shards, ...] -> [V, ...]
        """Return what all processes have for their shards, in order of shard."""
        if self.size == 1:
            return parts
        import torch.distributed as dist

        found = parts.new_empty(self.size * len(parts), *parts.shape[1:])
        with self._together():
            dist.all_gather(list(found.chunk(self.size)), parts.contiguous())
        return found

    def from_first(self, tensor: Tensor) -> None:
        """Write over a tensor with that of the first process."""
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.broadcast(tensor, 0)

    def require_same(self, what: str) -> None:
        """Raise `UserError` where this process computes on other things than the first, so with other last bits."""
        if (first := self.text_from_first(what)) != what:
            raise UserError(
                f"process {self.rank} computes on {what}, and the first on {first}: the last bits would differ; run "
                "all on machines of one kind with the same libraries, or with --inexact"
            )

    def text_from_first(self, text: str = "") -> str:
        """Return the text of the first process."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self.from_first(size)
        data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        self.from_first(data)
        return data.numpy().tobytes().decode()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say of a broken exchange that a process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise ProjectError(
                f"process {self.rank}: another process of this training stopped; the newest checkpoint is kept, and "
                "the same number of processes or another one continues with: torchrun ... -m train resume RUN"
            ) from error
