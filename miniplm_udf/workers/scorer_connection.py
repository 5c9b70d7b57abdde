"""The connection of a Spark worker to a scorer process: starts the process, and sends and receives its messages.

Input: the slot of a process (`process_slots`) and a task's request. Output: the answers to slices, in order; a
`ProcessDied` that says how the process ended and what it was doing; or the error that it raised. Decides nothing: the
client does (`scorer_client`). Executor side, in the Spark worker; a retried task connects again, to the process that
runs or to a new one.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import pyarrow as pa

from miniplm_udf.workers.process_slots import ScorerSlot
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.scorer_wire import (
    ConnectionClosed,
    LoadedModel,
    LoadingModel,
    Message,
    ProcessDying,
    ScoredSlice,
    SliceRequest,
    TaskFailed,
    TaskReady,
    TaskRequest,
    Wire,
    from_ipc,
    to_ipc,
)
from miniplm_udf.workers.worker_scorers import WorkerScorer

LOGGER = logging.getLogger("miniplm.workers")

_EXIT_SECONDS = 10.0
# Processes that this worker started, by their socket: only the parent can read their exit status.
_STARTED: dict[str, subprocess.Popen[bytes]] = {}

T = TypeVar("T")

Factories = Mapping[str, Callable[[], WorkerScorer]]


def task_request(
    slot: ScorerSlot, factories: Factories, carried: Sequence[str], aliases: Iterable[str], schema: pa.Schema
) -> TaskRequest:
    """The request of a task.

    Args:
        slot: the slot of the process.
        factories: callables with a `key` that make the scorers, by alias.
        carried: names of the columns that come out unchanged, the instance's id first.
        aliases: the models to load before the first slice.
        schema: columns of the results.
    """
    try:
        # As Spark pickles functions: including code that is in no module.
        from pyspark import cloudpickle as pickle
    except ImportError:
        import pickle
    return TaskRequest(
        daemon=slot.daemon,
        path=_path(),
        factories=pickle.dumps(dict(factories)),
        carried=list(carried),
        aliases=list(aliases),
        schema=schema,
    )


def _path() -> list[str]:
    """The folders in which this worker finds its modules, with the folders of Spark's `--py-files`."""
    return [path or os.getcwd() for path in sys.path]


class ProcessDied(Exception):
    """The process has ended.

    Attributes:
        how: how it ended, in words.
        while_loading: what it was loading; None if it was scoring.
    """

    def __init__(self, how: str, while_loading: str | None) -> None:
        super().__init__(how)
        self.how, self.while_loading = how, while_loading


class ProcessConnection:
    """The connection of one task to the process of its slot."""

    def __init__(self, slot: ScorerSlot, request: TaskRequest) -> None:
        self._slot, self._request = slot, request
        self._wire: Wire | None = None
        self._loading: str | None = None
        self._dying_message = ""
        self.slice_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether the task is connected to the process."""
        return self._wire is not None

    def open(self) -> None:
        """Connects, starts the process where it is not running, and waits until the models are loaded.

        Raises:
            ProcessDied: the process ended before that.
        """
        self._loading, self._dying_message = "its start", ""
        self._wire = Wire(self._connected())
        self._send(self._request)
        self.slice_bytes = self._receive(TaskReady).slice_bytes
        self._loading = None

    def close(self) -> None:
        """Closes the connection, if it is open; the process keeps running."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def send(self, rows: pa.RecordBatch) -> None:
        """Sends a slice. If it cannot arrive, the next `answer` raises the reason.

        Args:
            rows: the slice, in the columns that `Engine.prepare` takes.
        """
        self._send(SliceRequest(to_ipc([rows])))

    def answer(self) -> tuple[list[pa.RecordBatch], ScoreCounts]:
        """Waits for the scored rows of the oldest slice without an answer, and their counts.

        Raises:
            ProcessDied: the process ended before it answered.
            MiniplmError: the error that the process raised.
        """
        scored = self._receive(ScoredSlice)
        return from_ipc(scored.stream), scored.counts

    def has_answer(self, patience_seconds: float) -> bool:
        """Whether an answer begins to arrive within `patience_seconds`.

        Args:
            patience_seconds: longest time to wait. If the connection ends, this returns True, and `answer` raises.
        """
        assert self._wire is not None
        return self._wire.has_message(patience_seconds)

    def _connected(self) -> socket.socket:
        try:
            return _connection(self._slot)
        except (FileNotFoundError, ConnectionRefusedError):
            _STARTED[str(self._slot.socket)] = _start(self._slot)
        try:
            return _connection(self._slot)
        except ConnectionRefusedError:  # the new process has ended already
            raise self._died() from None

    def _send(self, message: Message) -> None:
        assert self._wire is not None
        with contextlib.suppress(ConnectionClosed):
            self._wire.send(message)

    def _receive(self, expected: type[T]) -> T:
        """Waits for the next message of a class; handles messages of other classes that come before it."""
        assert self._wire is not None
        while True:
            try:
                message = self._wire.receive()
            except ConnectionClosed:
                raise self._died() from None
            if isinstance(message, expected):
                return message
            match message:
                case TaskFailed(error):
                    raise error
                case ProcessDying(reason):
                    self._dying_message = reason
                case LoadingModel(alias):
                    self._loading = f"loading {alias}"
                case LoadedModel(slice_bytes):
                    self._loading, self.slice_bytes = None, slice_bytes

    def _died(self) -> ProcessDied:
        self.close()
        how = _ending(_STARTED.pop(str(self._slot.socket), None))
        return ProcessDied(f"{how}: {self._dying_message}" if self._dying_message else how, self._loading)


def _connection(slot: ScorerSlot) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(slot.socket))
    except OSError:
        connection.close()
        raise
    return connection


def _start(slot: ScorerSlot) -> subprocess.Popen[bytes]:
    """Starts the process of a slot: a new interpreter with this one's modules, since CUDA does not work after a fork.

    The worker, which holds the slot, makes the listening socket, so that it can connect before the process is ready.
    """
    slot.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(slot.socket))
        listener.listen()
        command = [sys.executable, "-P", "-m", "miniplm_udf.workers.scorer_process"]
        command += ["--listener", str(listener.fileno()), "--owner", str(slot.owner)]
        command += ["--gpus", *slot.gpus]
        started = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_path())},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
    LOGGER.info("scorer process %d started for %s", started.pid, slot.socket)
    return started


def _ending(process: subprocess.Popen[bytes] | None) -> str:
    """How a process ended, in words. Only the worker that started the process can know its exit status."""
    if process is None:
        return "ended (see the executor's log)"
    try:
        code = process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed the connection (see the executor's log)"
    if code >= 0:
        return f"ended with exit code {code} (see the executor's log)"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}{', perhaps by the kernel for lack of memory' if -code == signal.SIGKILL else ''}"
