"""Several ranks on this machine, as torchrun starts them, without torchrun's start of several seconds a rank.

The ranks are forked from one process that has imported torch and the trainer. They count as hanging without a sign of
progress: processor time, because a rank that waits for another in a collective uses none.
"""

import contextlib
import faulthandler
import functools
import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from miniplm_udf.errors import MiniplmError
from trainer.ranks.distributed import World, process_group

PRELOAD = ["tests.support.loops", "trainer.train", "mlflow", __name__]
# Without a sign of progress for this long, ranks count as hanging. A loaded machine starts them slowly, yet it works.
SECONDS_WITHOUT_PROGRESS = 120


def _rank(rank: int, size: int, port: int, work: Callable[[Path], None], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    # The store is in the parent, as torchrun's is, so no other process can take its port.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    try:
        work(folder)
    except MiniplmError as error:
        # The wrapped model must be gone with the process group, even if the error is kept.
        alive = [item for item in gc.get_objects() if isinstance(item, DistributedDataParallel)]
        (folder / f"{rank}.txt").write_text(f"{error}, {len(alive)} alive")


def _join(work: Callable[[World, Path], None], folder: Path) -> None:
    with process_group() as world:
        work(world, folder)


def processor_seconds(processes: Sequence[Any]) -> float:
    """Processor seconds that processes have used so far; processes that have ended count nothing."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(process.pid).cpu_times()
            total += times.user + times.system
    return total


def run_ranks(work: Callable[[World, Path], None], folder: Path, size: int = 2) -> None:
    """Runs `work` in `size` processes that have joined their group; see `run_processes`."""
    run_processes(functools.partial(_join, work), folder, size)


def run_processes(work: Callable[[Path], None], folder: Path, size: int = 2) -> None:
    """Runs `work` in `size` processes. A MiniplmError of rank r is written to `folder/r.txt`; other errors raise.

    Ranks that stop making progress print their stacks to stderr and are killed.
    """
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (size, store.port, work, folder)
    context = multiprocessing.start_processes(_rank, arguments, size, join=False, start_method="forkserver")
    used, deadline = 0.0, time.monotonic() + SECONDS_WITHOUT_PROGRESS
    try:
        while not context.join(timeout=1):
            # Even ranks that wait for each other use about 0.01 s a second.
            if abs((now_used := processor_seconds(context.processes)) - used) > 0.05 * SECONDS_WITHOUT_PROGRESS:
                used, deadline = now_used, time.monotonic() + SECONDS_WITHOUT_PROGRESS
            if time.monotonic() > deadline:
                for process in filter(lambda process: process.is_alive(), context.processes):
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                said = {path.name: path.read_text() for path in folder.glob("*.txt")}
                alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                pytest.fail(f"ranks {alive} made no progress for {SECONDS_WITHOUT_PROGRESS} s; they said {said}")
    finally:
        for process in context.processes:
            process.kill()
