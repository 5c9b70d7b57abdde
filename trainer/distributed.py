"""Ranks: one process, or several under `torchrun` (gloo on CPUs, nccl on GPUs).

Owns the process group and the choice of device. Reads the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE); they are the launcher's interface and not configuration. Without torchrun the process is rank 0 of 1,
and every collective returns its argument.
"""

import dataclasses
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class World:
    """The place of this process among all ranks.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine, from 0.
        nodes: number of machines.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all ranks.

        Args:
            value: this rank's tensor, on this rank's device; the same shape on every rank. It stays as it is.

        Returns:
            The sum, of the same shape, equal on every rank.
        """
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: Any) -> Any:
        """Returns rank 0's value on every rank. Every rank waits here for rank 0.

        Args:
            value: any value that can be pickled; ignored on other ranks than 0.
        """
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def process_group() -> Iterator[World]:
    """Yields the `World` of this process; under torchrun, joins the process group and leaves it at the end.

    Create a DistributedDataParallel model in a function that this block calls, so that it is freed before the group
    ends. If it is freed later, it stops gloo's threads while it holds the GIL that they may wait for: a deadlock.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        nodes = size // int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        yield World(
            rank=dist.get_rank(),
            size=size,
            local_rank=local_rank,
            nodes=nodes,
            device=device,
        )
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames would keep the model alive
        raise
    finally:
        dist.destroy_process_group()
