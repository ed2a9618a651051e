"""The processes of one harvest, as `torchrun` starts them; without it there is one.

They share nothing but the store's folder. A process that fails ends the harvest: what is committed stays.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from shared.errors import ProjectError, UserError
from shared.resources import usable_cores

_PATIENCE = timedelta(days=7)  # packing a large corpus takes hours, and a dead process is noticed at once


class Ranks:
    """This process among those of the harvest."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self._neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def first(self) -> bool:
        """Whether this process plans, publishes what all share, and speaks."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Cores for this process, when those of one machine share it evenly."""
        return max(1, usable_cores() // self._neighbours)

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def least(self, value: int) -> int:
        """Return the least of all processes' values, when all have given theirs."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value])
        try:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        except RuntimeError as error:
            raise ProjectError(f"process {self.rank}: another process of this harvest stopped") from error
        return int(tensor)

    def require_same(self, what: str, *, inexact: bool) -> None:
        """Raise `UserError` where the processes compute on what is not the same, unless `inexact` lets them."""
        digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7])
        same = self.least(digest) == -self.least(-digest)
        if not same and not inexact:
            raise UserError(
                f"process {self.rank} computes on {what}, and another one on something else: the last bits of rows can "
                "differ; run it on devices of one kind, or pass --inexact"
            )

    def wait(self) -> None:
        """Return when all processes have come this far."""
        self.least(0)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Run what only the first process does, while the others `follow`."""
        try:
            yield
        except BaseException:
            self.least(-1)
            raise
        self.least(0)

    def follow(self) -> None:
        """Wait for the first process; raises `ProjectError` when it failed."""
        if self.least(0) < 0:
            raise ProjectError(f"process {self.rank}: process 0 of this harvest stopped; its message says why")
