"""Ranks: one process, or several under `torchrun` (gloo on CPUs, nccl on GPUs).

Owns the process group, the choice of device, and the messages between ranks outside the forward and backward pass: a
decision of rank 0, an error of one rank, a request to stop. Reads the variables that torchrun sets (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE); they are the launcher's interface and not configuration. Without torchrun the process is
rank 0 of 1, and every collective returns its argument.
"""

import dataclasses
import enum
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from miniplm_udf.errors import ConfigError, MiniplmError, first_line

_T = TypeVar("_T")
_joined: "World | None" = None  # in a block of `process_group` under torchrun


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
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def from_all(self, value: _T) -> list[_T]:
        """Returns the values of all ranks, in the order of the ranks. Every rank waits here for every other.

        Args:
            value: this rank's value, which can be pickled.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_decides(self, decide: Callable[[], _T]) -> _T:
        """Calls a function on rank 0 only, and gives every rank its result.

        Args:
            decide: the function; its result can be pickled.

        Returns:
            The result of rank 0.

        Raises:
            MiniplmError: on every rank, the error that `decide` raised on rank 0.
        """
        result, error = self.from_first(_attempt(decide) if self.is_first else None)
        if error is not None:
            raise error
        return cast(_T, result)

    def together(self, work: Callable[[], _T]) -> _T:
        """Calls `work` on every rank; if it raises a MiniplmError on any rank, every rank raises an error.

        Args:
            work: the call, which does not wait for other ranks.

        Returns:
            This rank's result.

        Raises:
            MiniplmError: this rank's error, or the first error of another rank with the number of that rank.
        """
        result, error = _attempt(work)
        errors = self.from_all(error)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise type(other)(f"rank {rank}: {other}")
        return cast(_T, result)


def _attempt(work: Callable[[], _T]) -> tuple[_T | None, MiniplmError | None]:
    """The result of a call and None, or None and the MiniplmError that it raised."""
    try:
        return work(), None
    except MiniplmError as raised:
        return None, raised


class Request(enum.IntEnum):
    """A rank's request after a step: continue, stop or fail. The highest request of all ranks applies."""

    CONTINUE = 0
    STOP = 1
    FAIL = 2


class Agreement:
    """Lets all ranks leave the training loop after the same step. The exchange never waits for a GPU.

    A request sent after step n reaches every rank by the end of step n + 1, because the exchange runs during that step.

    Args:
        world: the place of this process among the ranks.
    """

    def __init__(self, world: World) -> None:
        # A separate group, so that the exchange never waits behind a collective of the backward pass.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._running: tuple[dist.Work, torch.Tensor] | None = None

    def after_step(self, request: Request) -> Request:
        """Sends this rank's request after a step.

        Args:
            request: the request of this rank.

        Returns:
            The highest request of all ranks after the previous step; the same on every rank. With one rank: `request`.
        """
        if self._group is None:
            return request
        agreed = self._result()
        flag = torch.tensor([int(request)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._running = (cast(dist.Work, work), flag)
        return agreed

    def now(self, request: Request) -> Request:
        """Sends this rank's request, and waits for all ranks.

        Args:
            request: the request of this rank.

        Returns:
            The highest request of all ranks.
        """
        if self._group is None:
            return request
        earlier = self._result()
        self.after_step(request)
        return max(earlier, self._result())

    def _result(self) -> Request:
        if self._running is None:
            return Request.CONTINUE
        work, flag = self._running
        self._running = None
        work.wait()
        return Request(int(flag))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(device: torch.device) -> None:
    """Joins the process group.

    Raises:
        ConfigError: rank 0 cannot open the port, or this rank cannot reach it.
    """
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # a variable is missing or no number
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other variables of a launcher are not as expected: "
            f"{first_line(error)}; start several processes with torchrun, or unset WORLD_SIZE"
        ) from error
    except RuntimeError as error:  # gloo raises it as it is; torch's DistError is a subclass
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = "the port is in use" if "EADDRINUSE" in str(error) else first_line(error)
        raise ConfigError(
            f"MASTER_PORT: the ranks cannot meet at {place}: {reason}; set MASTER_PORT, or torchrun's --master-port, "
            "to a free port of rank 0's machine; on one machine, torchrun --standalone finds one"
        ) from error


@contextmanager
def process_group() -> Iterator[World]:
    """Yields the `World` of this process; under torchrun, joins the process group and leaves it at the end.

    A block inside another one yields the same `World` and leaves the group as it is. All trainings of a command need
    one group: ranks that join a second time can find the addresses that another rank had in the first group.

    Create a DistributedDataParallel model in a function that this block calls, so that it is freed before the group
    ends. If it is freed later, it stops gloo's threads while it holds the GIL that they may wait for: a deadlock.

    Raises:
        ConfigError: the ranks cannot meet at MASTER_ADDR and MASTER_PORT.
        MiniplmError: another rank ended while this rank waited for it.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if size == 1:
        yield World(device=device)
        return
    _join(device)
    rank = dist.get_rank()
    try:
        nodes = size // int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        _joined = World(rank, size, local_rank, nodes, device)
        yield _joined
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames would keep the model alive
        if _is_lost_connection(error):
            raise MiniplmError(
                f"rank {rank} lost the connection to another rank, whose message says why; the same command resumes "
                f"from the last checkpoint ({first_line(error)})"
            ) from error
        raise
    finally:
        _joined = None
        dist.destroy_process_group()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone. gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
