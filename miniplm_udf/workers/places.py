"""Who may use what of this machine: GPUs that hold models, and the places of an executor's scorer processes.

A place is a locked file: free again when it is closed, or when the process that locked it ends, however it ends. A
GPU's is kept for the life of the process that holds a model on it; a scorer's is held by one Spark task at a time, and
names the socket of its process. All lie in a folder of this user alone. Executor side; a retried task takes a place
anew. Knows nothing of models, and loads neither torch nor pyspark when imported.
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
from typing import IO, Any

import psutil

from miniplm_udf.errors import ScoringError

LOGGER = logging.getLogger("miniplm.udf")

_LOG_EVERY_SECONDS = 60.0
# The path of a socket has at most 107 bytes (sockaddr_un); on YARN the folder for temporary files alone can be longer.
_LONGEST_SOCKET = 100
# Places that this process keeps until it ends, by the name of what they are places of.
_KEPT: dict[str, IO[str]] = {}
# In a scorer process: the GPU of the task that it was started for.
_ASSIGNED: list[str] = []


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ScoringError(
            f"{folder}: expected a folder that only this user can look into, found mode {found.st_mode:o} of user "
            f"{found.st_uid}; remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def _node_folder() -> Path:
    return _private(Path(tempfile.gettempdir()) / f"miniplm-{os.getuid()}")


def _locked(path: Path) -> IO[str] | None:
    """The file, locked; None where another process has it."""
    file = path.open("a+")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


# GPUs


def assign_gpu(address: str | None) -> None:
    """In a scorer process: says which GPU Spark assigned to the task that it was started for."""
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


def keep_place(name: str, places: int) -> None:
    """Takes one of the places of a thing, and keeps it until this process ends. Does nothing where it has one.

    Raises:
        ScoringError: the others have kept it for ten minutes.
    """
    if name not in _KEPT:
        _KEPT[name] = take_place(name, places)


def take_place(name: str, places: int, patience_seconds: float = 600.0) -> IO[str]:
    """Waits for one of the places of a thing that processes of this machine share.

    Returns:
        The open file whose lock is the place.

    Raises:
        ScoringError: all are taken for so long.
    """
    folder = _node_folder()
    start = logged = time.monotonic()
    with (folder / f"{name}.wanted").open("a") as wanted:
        while True:
            for place in range(places):
                if (file := _locked(folder / f"{name}-{place}")) is not None:
                    return file
            # An idle scorer process sees this lock, and makes room.
            fcntl.flock(wanted, fcntl.LOCK_SH)
            waited = time.monotonic() - start
            found = f"{name}: {places} other worker processes have had this GPU for {waited:.0f} s"
            hint = (
                "ask for a GPU a task (spark.task.resource.gpu.amount=1), or let more share one (score.workers_per_gpu)"
            )
            if waited >= patience_seconds:
                raise ScoringError(f"{found}; {hint}")
            if time.monotonic() - logged >= _LOG_EVERY_SECONDS:
                logged = time.monotonic()
                LOGGER.warning("%s; %s", found, hint)
            time.sleep(min(1.0, patience_seconds))


def kept_place_is_wanted() -> bool:
    """Whether another process waits for a place that this one keeps."""
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

    The daemon ends with the Spark session, also where the JVM stays, as in a notebook.
    """
    me = one = psutil.Process()
    with contextlib.suppress(psutil.Error):
        while (parent := one.parent()) is not None:
            if parent.name() == "java":
                return parent, parent if one is me else one
            one = parent
    return me, me


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit status yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclasses.dataclass
class ScorerPlace:
    """The place of one scorer process of this executor: of one task at a time, in whichever worker that runs.

    Attributes:
        socket: where its process listens.
        gpu: the GPU that Spark assigned to the task, which the process is bound to.
        owner: the process that a scorer process must not outlive.
        daemon: that forked this worker.
    """

    socket: Path
    gpu: str | None
    owner: int
    daemon: int
    _file: IO[str]
    _keys: list[str]

    @property
    def deaths(self) -> int:
        """How often its process died since it last answered, in this task and those before it."""
        return int(_note(self._file).get("deaths", 0))

    @deaths.setter
    def deaths(self, n: int) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps({"keys": self._keys, "deaths": n}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _note(file: IO[str]) -> dict[str, Any]:
    """What the last task left in a place's file; nothing, where it was killed over it."""
    file.seek(0)
    with contextlib.suppress(ValueError):
        return dict(json.loads(file.read()))
    return {}


def take_scorer_place(keys: Sequence[str]) -> ScorerPlace:
    """A free place of this executor (and GPU): the one whose process has these models, else the first; else a new one.

    Args:
        keys: of the models that the task needs.
    """
    owner, daemon = executor()
    address, wanted = gpu_address(), sorted(keys)
    folder = _executor_folder(owner.pid)
    name = hashlib.md5(str(address).encode()).hexdigest()[:6]
    # One at a time: a place that another looks at for a moment is not to seem taken.
    with (folder / "choosing").open("a") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        path, file = _best(_free_places(folder, name), wanted)
    place = ScorerPlace(path.with_suffix(""), address, owner.pid, daemon.pid, file, wanted)
    if _note(file).get("keys") != wanted:
        place.deaths = 0
    return place


def _free_places(folder: Path, name: str) -> dict[Path, IO[str]]:
    """Those that are there and free, locked; a new one where there is none."""
    free: dict[Path, IO[str]] = {}
    for path in (folder / f"{name}-{n}.lock" for n in itertools.count()):
        if free and not path.exists():
            break
        if (file := _locked(path)) is not None:
            free[path] = file
    return free


def _best(free: dict[Path, IO[str]], wanted: list[str]) -> tuple[Path, IO[str]]:
    """The first place whose last task had these models, else the first; the others are let go."""
    best = next((path for path, file in free.items() if _note(file).get("keys") == wanted), next(iter(free)))
    for path in free.keys() - {best}:
        free[path].close()
    return best, free[best]


def _executor_folder(owner: int) -> Path:
    """Of the executor with this JVM. Those of executors that are gone are removed."""
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
