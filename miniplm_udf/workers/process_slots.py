"""The slots of an executor's scorer processes: which task talks to which process.

A slot is a locked file (`slot_files`). One Spark task at a time holds it, and its name gives the process's socket. Owns
also who the executor of this process is, and whether a process has ended. Executor side; a retried task takes a slot
again. Knows no models; loads neither torch nor pyspark when imported.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from miniplm_udf.storage import Json
from miniplm_udf.workers.gpu_slots import gpu_addresses
from miniplm_udf.workers.slot_files import locked, node_folder, private_folder

# A socket's path has at most 107 bytes (sockaddr_un); on YARN the folder for temporary files alone can be longer.
_LONGEST_SOCKET = 100


def executor() -> tuple[psutil.Process, psutil.Process]:
    """The executor's JVM, and the daemon that forks its Python workers. Outside Spark both are this process.

    The daemon ends with the Spark session, even where the JVM keeps running, as in a notebook.
    """
    me = process = psutil.Process()
    with contextlib.suppress(psutil.Error):
        while (parent := process.parent()) is not None:
            if parent.name() == "java":
                return parent, parent if process is me else process
            process = parent
    return me, me


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; a zombie, whose exit status nobody has read yet, has ended too.

    Args:
        process: a process of this machine.
    """
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclasses.dataclass
class ScorerSlot:
    """The slot of one scorer process of this executor. One task at a time holds it, in any of the executor's workers.

    Attributes:
        socket: path of the socket on which the process listens.
        gpus: addresses of the GPUs that Spark assigned to the task, which the process uses; empty for none.
        owner: process id of the executor, which the scorer process must not outlive.
        daemon: process id of the daemon that forked this worker.
    """

    socket: Path
    gpus: list[str]
    owner: int
    daemon: int
    _file: IO[str]
    _keys: list[str]

    @property
    def deaths(self) -> int:
        """How often the process died since its last answer, in this and earlier tasks."""
        return int(_note(self._file).get("deaths", 0))

    @deaths.setter
    def deaths(self, n: int) -> None:
        """Writes the number `n` of deaths into the slot's file, with the keys of the task's models."""
        self._file.truncate(0)
        self._file.write(json.dumps({"keys": self._keys, "deaths": n}))
        self._file.flush()

    def close(self) -> None:
        """Frees the slot for another task; the scorer process keeps running."""
        self._file.close()


def _note(file: IO[str]) -> Json:
    """The JSON that the last task wrote into a slot's file; {} where it was killed while it wrote."""
    file.seek(0)
    with contextlib.suppress(ValueError):
        return dict(json.loads(file.read()))
    return {}


def take_scorer_slot(keys: Sequence[str]) -> ScorerSlot:
    """Takes a free slot of this executor: a slot whose process has the models, else the first, else a new slot.

    Each set of GPUs has slots of its own.

    Args:
        keys: keys of the factories whose models the task needs (`ModelScorerFactory.key`).

    Returns:
        The slot, which is free again when it is closed.
    """
    owner, daemon = executor()
    addresses, keys = gpu_addresses(), sorted(keys)
    folder = _executor_folder(owner.pid)
    name = hashlib.md5(str(addresses).encode()).hexdigest()[:6]
    # One task chooses at a time, since a slot that another task is examining would seem taken.
    with (folder / "choosing").open("a") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        path, file = _best(_free_slots(folder, name), keys)
    slot = ScorerSlot(path.with_suffix(""), addresses, owner.pid, daemon.pid, file, keys)
    if _note(file).get("keys") != keys:
        slot.deaths = 0
    return slot


def _free_slots(folder: Path, name: str) -> dict[Path, IO[str]]:
    """The existing slots that are free, locked; a new slot where none is free."""
    free: dict[Path, IO[str]] = {}
    for path in (folder / f"{name}-{n}.lock" for n in itertools.count()):
        if free and not path.exists():
            break
        if (file := locked(path)) is not None:
            free[path] = file
    return free


def _best(free: dict[Path, IO[str]], keys: list[str]) -> tuple[Path, IO[str]]:
    """The first slot whose last task had these models, else the first slot; releases the others."""
    best = next((path for path, file in free.items() if _note(file).get("keys") == keys), next(iter(free)))
    for path in free.keys() - {best}:
        free[path].close()
    return best, free[best]


def _executor_folder(owner: int) -> Path:
    """The folder of the executor with this JVM's process id. Removes the folders of executors that have ended."""
    node = hashlib.md5(socket.gethostname().encode()).hexdigest()[:6]
    parent = node_folder()
    if len(os.fsencode(parent)) > _LONGEST_SOCKET - 32:
        parent = private_folder(Path("/tmp") / parent.name)
    folder = parent / f"{owner}-{node}"
    if not folder.exists():
        for other in parent.glob(f"*-{node}"):
            if (pid := other.name.split("-")[0]).isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(other, ignore_errors=True)
    return private_folder(folder)
