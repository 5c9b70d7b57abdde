"""Who may use which resource of this machine: GPUs that hold models, and the slots of an executor's scorer processes.

A slot is a locked file: it is free again when the file is closed, or when the process that locked it ends in whatever
way. A process that holds a model on a GPU keeps a slot of that GPU until it ends; the slot of a scorer process is held
by one Spark task at a time, and its name gives the process's socket. All files are in a folder that only this user can
read. Executor side; a retried task takes a slot again. Knows no models; loads neither torch nor pyspark when imported.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from miniplm_udf.errors import ScoringError
from miniplm_udf.storage import Json

LOGGER = logging.getLogger("miniplm.workers")

_LOG_EVERY_SECONDS = 60.0
# A socket's path has at most 107 bytes (sockaddr_un); on YARN the folder for temporary files alone can be longer.
_LONGEST_SOCKET = 100
# Slots that this process keeps until it ends, by the name of the resource.
_KEPT: dict[str, IO[str]] = {}
# In a scorer process: the GPU of the task that it was started for.
_ASSIGNED: list[str] = []


def _private(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        ScoringError: another user owns or can read it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ScoringError(
            f"{folder}: expected a folder that only this user can read, found mode {status.st_mode:o} of user "
            f"{status.st_uid}; remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def _node_folder() -> Path:
    return _private(Path(tempfile.gettempdir()) / f"miniplm-{os.getuid()}")


def _locked(path: Path) -> IO[str] | None:
    """The file, opened and locked; None where another process holds the lock."""
    file = path.open("a+")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


# GPUs


def assign_gpu(address: str | None) -> None:
    """Sets the GPU of this scorer process.

    Args:
        address: address of the GPU that Spark assigned to the task that started the process; None for no GPU.
    """
    _ASSIGNED[:] = [] if address is None else [address]


def gpu_address() -> str | None:
    """The address of the GPU that Spark assigned to this task, or that `assign_gpu` named."""
    if _ASSIGNED:
        return _ASSIGNED[0]
    try:
        from pyspark import TaskContext
    except ImportError:
        return None
    context = TaskContext.get()
    resources = context.resources() if context is not None else {}
    return str(resources["gpu"].addresses[0]) if "gpu" in resources else None


def keep_slot(name: str, slots: int) -> None:
    """Takes a slot of a GPU and keeps it until this process ends. Does nothing if this process has a slot.

    Args:
        name: name of the GPU, the same in all processes of this machine.
        slots: processes that may share it.

    Raises:
        ScoringError: other processes have kept all slots for ten minutes.
    """
    if name not in _KEPT:
        _KEPT[name] = take_slot(name, slots)


def take_slot(name: str, slots: int, patience_seconds: float = 600.0) -> IO[str]:
    """Waits for a free slot of a GPU that processes of this machine share.

    Args:
        name: name of the GPU, the same in all processes of this machine.
        slots: processes that may share it.
        patience_seconds: longest wait.

    Returns:
        The open file; whoever holds its lock has the slot.

    Raises:
        ScoringError: other processes have kept all slots for `patience_seconds`.
    """
    folder = _node_folder()
    start = logged = time.monotonic()
    with (folder / f"{name}.wanted").open("a") as wanted:
        while True:
            for number in range(slots):
                if (file := _locked(folder / f"{name}-{number}")) is not None:
                    return file
            # An idle scorer process sees this lock and ends.
            fcntl.flock(wanted, fcntl.LOCK_SH)
            waited = time.monotonic() - start
            problem = f"{name}: {slots} other worker processes have had this GPU for {waited:.0f} s"
            hint = (
                "ask for a GPU a task (spark.task.resource.gpu.amount=1), or let more share one (score.workers_per_gpu)"
            )
            if waited >= patience_seconds:
                raise ScoringError(f"{problem}; {hint}")
            if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
                logged = time.monotonic()
                LOGGER.warning("%s; %s", problem, hint)
            time.sleep(min(1.0, patience_seconds))


def kept_slot_is_wanted() -> bool:
    """Whether another process waits for a slot that this process keeps."""
    for name in _KEPT:
        with (_node_folder() / f"{name}.wanted").open("a") as wanted:
            try:
                fcntl.flock(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


# Scorer processes


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
        gpu: address of the GPU that Spark assigned to the task; the process uses this GPU.
        owner: process id of the executor, which the scorer process must not outlive.
        daemon: process id of the daemon that forked this worker.
    """

    socket: Path
    gpu: str | None
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
    """Takes a free slot of this executor and GPU: a slot whose process has the models, else the first, else a new slot.

    Args:
        keys: keys of the factories whose models the task needs (`ModelScorerFactory.key`).

    Returns:
        The slot, which is free again when it is closed.
    """
    owner, daemon = executor()
    address, keys = gpu_address(), sorted(keys)
    folder = _executor_folder(owner.pid)
    name = hashlib.md5(str(address).encode()).hexdigest()[:6]
    # One task chooses at a time, since a slot that another task is examining would seem taken.
    with (folder / "choosing").open("a") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        path, file = _best(_free_slots(folder, name), keys)
    slot = ScorerSlot(path.with_suffix(""), address, owner.pid, daemon.pid, file, keys)
    if _note(file).get("keys") != keys:
        slot.deaths = 0
    return slot


def _free_slots(folder: Path, name: str) -> dict[Path, IO[str]]:
    """The existing slots that are free, locked; a new slot where none is free."""
    free: dict[Path, IO[str]] = {}
    for path in (folder / f"{name}-{n}.lock" for n in itertools.count()):
        if free and not path.exists():
            break
        if (file := _locked(path)) is not None:
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
    parent = _node_folder()
    if len(os.fsencode(parent)) > _LONGEST_SOCKET - 32:
        parent = _private(Path("/tmp") / parent.name)
    folder = parent / f"{owner}-{node}"
    if not folder.exists():
        for other in parent.glob(f"*-{node}"):
            if (pid := other.name.split("-")[0]).isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(other, ignore_errors=True)
    return _private(folder)
