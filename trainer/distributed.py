"""Ranks: one process, or several under `torchrun` (gloo on CPUs, nccl on GPUs).

Owns the process group and the choice of device. Reads what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE): these are the launcher's interface, no configuration of ours. Without torchrun all is rank 0 of 1
and every collective is the identity.
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
    """This process's place. `nodes` is the number of machines."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; the same on every rank."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank; a barrier, too."""
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
    """The `World` of this process; joins the group of torchrun, where there is one, and leaves it at the end.

    What is built on the group (DistributedDataParallel) has to be let go inside: make it in a function that this block
    calls. One that outlives the group ends gloo's threads while it holds the GIL that they may wait for, for ever.
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
        traceback.clear_frames(error.__traceback__)  # they would keep it
        raise
    finally:
        dist.destroy_process_group()
