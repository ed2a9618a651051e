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

    def any(self, flag: bool) -> bool:
        """Tell whether a process says so."""
        count = torch.tensor([int(flag)])
        if self.size > 1:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(count)
        return bool(count)

    def add(self, table: Tensor) -> slice:  # [B, ...]
        """Add the tables of all processes; returns the rows whose sums are then in this process's `table`.

        Sums are made by pairs: the first two, the next two, ..., and their sums so again. The table of a process is the
        sum of its shards', made so as well. So a sum is that of one process, which has all shards. Of a pair, each
        process sends half of its rows and adds the other half. The rows that it sent are not valid afterwards.
        """
        rows = slice(0, len(table))
        for peer, mine, theirs in self._halves(len(table)):
            other = torch.empty_like(table[mine])
            self._swap(peer, [table[theirs]], [other])
            table[mine] += other  # of two numbers the sum is the same in either order
            rows = mine
        return rows

    def spread(self, *tables: Tensor) -> None:  # [B, ...]
        """Give every process the rows of `tables` that the others have; each has those that `add` returned."""
        for peer, mine, theirs in reversed(self._halves(len(tables[0]))):
            self._swap(peer, [table[mine] for table in tables], [table[theirs] for table in tables])

    def _halves(self, rows: int) -> list[tuple[int, slice, slice]]:
        """Return the processes to exchange rows with, in order, and for each which rows to keep and which to send."""
        found, low, high = [], 0, rows
        for far in self._distances():
            lower, upper = slice(low, (low + high) // 2), slice((low + high) // 2, high)
            mine, theirs = (upper, lower) if self.rank & far else (lower, upper)
            found.append((self.rank ^ far, mine, theirs))
            low, high = mine.start, mine.stop
        return found

    def _swap(self, peer: int, sent: list[Tensor], received: list[Tensor]) -> None:
        """Send tensors to another process, and write over others with what it sends."""
        import torch.distributed as dist

        pairs = [(dist.isend, one) for one in sent] + [(dist.irecv, one) for one in received]
        exchange = [dist.P2POp(what, one, peer) for what, one in pairs if len(one)]
        with self._together():
            for pending in dist.batch_isend_irecv(exchange) if exchange else ():
                pending.wait()

    def gathered(self, parts: Tensor) -> Tensor:  # [own shards, ...] -> [V, ...]
        """Return what all processes have for their shards, in order of shard."""
        if self.size == 1:
            return parts
        own = len(parts)
        found = parts.new_empty(self.size * own, *parts.shape[1:])
        found[self.rank * own : (self.rank + 1) * own] = parts
        for far in self._distances():  # twice as many shards each time
            mine, theirs = (
                slice(rank // far * far * own, (rank // far + 1) * far * own) for rank in (self.rank, self.rank ^ far)
            )
            self._swap(self.rank ^ far, [found[mine]], [found[theirs]])
        return found

    def _distances(self) -> list[int]:
        """Return how far the processes are that this one meets, one after the other: 1, 2, 4, ..."""
        return [1 << i for i in range(self.size.bit_length() - 1)]

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
