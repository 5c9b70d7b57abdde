"""Holds models and scores for Spark workers, one task at a time: `python -m miniplm_udf.workers.scorer_process`.

The first task of a slot starts it (`scorer_client`), in a session of its own. It lives as long as its executor, so that
a model is loaded once although Spark ends idle workers after a minute, and a crash of a model does not end the worker.
Input: slices over a unix socket; output: their scored rows and `ScoreCounts`, in order. While it scores a slice, a
thread reads and tokenizes the next slices. If the worker ends, its work is dropped. Only the models are kept.

It ends with its executor, with the Spark session, after half an hour without a task, or, while idle, when another
process waits for its GPU. Executor side; a retried task finds its models loaded. It logs to the executor's stderr.
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from miniplm_udf.errors import MiniplmError, ModelLoadError, ScoringError
from miniplm_udf.progress import configure_logging
from miniplm_udf.workers import gpu_slots, process_slots
from miniplm_udf.workers.engine import SLICES_AHEAD, Engine, PreparedSlice, loses_device
from miniplm_udf.workers.read_ahead import ReadAhead
from miniplm_udf.workers.scorer_wire import (
    ConnectionClosed,
    LoadedModel,
    LoadingModel,
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
from miniplm_udf.workers.worker_scorers import KeptScorer, WorkerScorer, WorkerScorers

LOGGER = logging.getLogger("miniplm.workers")

# The process ends when no task has come for this long; the next task loads the model again.
IDLE_SECONDS = 1800.0
_CHECK_EVERY_SECONDS = 0.5
# Spark may replace the daemon of its workers while the executor lives: a task of the new daemon may come in this time.
_DAEMON_SECONDS = 1.0
# When its worker has ended, work stops after a forward pass. If it takes longer than this, it has hung.
_DROP_SECONDS = 60.0
# Tells the kernel's out-of-memory killer to prefer this process, which is replaced, to the executor's JVM.
_OOM_SCORE = "500"


class Lifetime:
    """Decides when this process ends, from its executor and from the worker that is connected.

    Args:
        owner: process id of the executor.
        idle_seconds: longest time without a task.
    """

    def __init__(self, owner: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._owner = self._daemon = psutil.Process(owner)
        self._idle_seconds = idle_seconds
        self._connected = False
        self._since = time.monotonic()
        self._dropped_since: float | None = None

    def connected(self, daemon: int) -> None:
        """Notes that a worker has connected, and the daemon that forked it.

        Args:
            daemon: process id of that daemon.
        """
        self._connected, self._dropped_since = True, None
        with contextlib.suppress(psutil.NoSuchProcess):
            self._daemon = psutil.Process(daemon)

    def worker_is_gone(self) -> bool:
        """Whether the connected worker has closed the connection while its work may still be running here."""
        return self._dropped_since is not None

    def lost_worker(self) -> None:
        """Notes that the worker has closed the connection, although its work may still be running here."""
        self._dropped_since = time.monotonic()

    def disconnected(self) -> None:
        """Notes that the work of the last worker has ended: the process is idle."""
        self._connected, self._dropped_since = False, None
        self._since = time.monotonic()

    def reason_to_end(self) -> str | None:
        """Why this process must end now, for the log; None while it must not."""
        if process_slots.is_gone(self._owner):
            return "its executor is gone"
        now = time.monotonic()
        if self._connected:
            hung = self._dropped_since is not None and now - self._dropped_since > _DROP_SECONDS
            return "it is still busy with the work of a worker that has ended" if hung else None
        idle = now - self._since
        if idle > _DAEMON_SECONDS and process_slots.is_gone(self._daemon):
            return "the Spark session is gone"
        if idle > self._idle_seconds:
            return f"no task has come for {idle:.0f} s"
        return "another process waits for its GPU" if gpu_slots.kept_slot_is_wanted() else None

    def watch(self) -> None:
        """Ends this process as soon as there is a reason to. Runs in a thread of its own."""
        while (reason := self.reason_to_end()) is None:
            time.sleep(_CHECK_EVERY_SECONDS)
        LOGGER.info("scorer process %d ends: %s", os.getpid(), reason)
        # The interpreter's own exit would wait for the main thread and shut CUDA down.
        os._exit(0)


class ProcessScorers(WorkerScorers):
    """Scorers that tell the worker when they load a model, and stop when the worker has ended."""

    def __init__(self, factories: dict[str, Callable[[], WorkerScorer]], wire: Wire, lifetime: Lifetime) -> None:
        super().__init__(factories)
        self._wire, self._lifetime = wire, lifetime

    def progressed(self) -> None:
        """Stops the scorer once its worker has ended.

        Raises:
            ConnectionClosed: the worker has closed the connection.
        """
        if self._lifetime.worker_is_gone():
            raise ConnectionClosed

    def get(self, alias: str) -> KeptScorer:
        """Returns the scorer of an alias; tells the worker before and after a model is loaded.

        Args:
            alias: the model's alias.

        Raises:
            ModelLoadError: the model cannot be loaded.
            ScoringError: there is no factory for the alias.
        """
        if alias not in self._factories or self.existing(alias) is not None:
            return super().get(alias)
        self._wire.send(LoadingModel(alias))
        try:
            scorer = super().get(alias)
        except MiniplmError:
            raise
        except Exception as error:
            LOGGER.exception("%s: cannot be loaded", alias)
            raise ModelLoadError(f"{alias}: cannot be loaded: {type(error).__name__}: {error}") from error
        self._wire.send(LoadedModel(self.slice_bytes()))
        return scorer


def serve(listener: socket.socket, lifetime: Lifetime) -> None:
    """Scores for each worker that connects, one after the other. Never returns.

    Args:
        listener: the socket that workers connect to.
        lifetime: ends the process when nobody needs it any more.
    """
    while True:
        connection, _ = listener.accept()
        wire = Wire(connection)
        try:
            _score_for(wire, lifetime)
        except ConnectionClosed:
            LOGGER.warning("the worker has ended: its work is dropped")
        except MiniplmError as error:
            _tell(wire, TaskFailed(error))
        except BaseException as error:  # sent to the worker, which raises it or starts another process
            LOGGER.exception("scoring failed")
            message = f"{type(error).__name__}: {error}"
            if loses_device(error):
                _tell(wire, ProcessDying(message))
                os._exit(os.EX_SOFTWARE)
            _tell(wire, TaskFailed(ScoringError(message)))
        finally:
            wire.close()
            lifetime.disconnected()


def _tell(wire: Wire, message: TaskFailed | ProcessDying) -> None:
    with contextlib.suppress(ConnectionClosed):
        try:
            wire.send(message)
        except (pickle.PicklingError, AttributeError, TypeError):  # an error of a class that cannot be sent
            assert isinstance(message, TaskFailed)
            wire.send(TaskFailed(ScoringError(f"{type(message.error).__name__}: {message.error}")))


def _score_for(wire: Wire, lifetime: Lifetime) -> None:
    """Scores all slices of one task."""
    request = wire.receive()
    assert isinstance(request, TaskRequest)
    lifetime.connected(request.daemon)
    sys.path.extend(path for path in request.path if path not in sys.path)
    scorers = ProcessScorers(_factories(request.factories), wire, lifetime)
    engine = Engine(scorers, request.carried, request.schema)
    for alias in request.aliases:
        scorers.get(alias)
    wire.send(TaskReady(scorers.slice_bytes()))
    with ReadAhead(_slices(wire, engine, lifetime), SLICES_AHEAD) as slices:
        try:
            for prepared in slices:
                batches, counts = engine.score(prepared)
                wire.send(ScoredSlice(to_ipc(batches), counts))
        finally:
            wire.stop_reading()


def _factories(pickled: bytes) -> dict[str, Callable[[], WorkerScorer]]:
    try:
        return dict(pickle.loads(pickled))
    except Exception as error:
        LOGGER.exception("factories cannot be unpickled")
        raise ScoringError(
            f"expected factories that the scorer process can unpickle, found {type(error).__name__}: {error}; put "
            f"their modules on the path of the executor's Python"
        ) from error


def _slices(wire: Wire, engine: Engine, lifetime: Lifetime) -> Iterator[PreparedSlice]:
    """Receives and prepares slices until the worker closes the connection. Runs in the reading thread."""
    while True:
        try:
            message = wire.receive()
        except ConnectionClosed:
            lifetime.lost_worker()
            return
        assert isinstance(message, SliceRequest)
        (rows,) = from_ipc(message.stream)
        yield engine.prepare(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Starts this scorer process: reads its arguments, then serves workers until a reason to end appears.

    Args:
        argv: the arguments; None takes the arguments of the process.
    """
    parser = argparse.ArgumentParser(description="Holds models and scores for the workers of one Spark executor.")
    parser.add_argument("--listener", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--owner", type=int, required=True, help="id of the process that this one must not outlive")
    parser.add_argument("--gpus", nargs="*", default=[], help="addresses of the GPUs that Spark assigned to the task")
    arguments = parser.parse_args(argv)
    configure_logging()
    faulthandler.enable()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    gpu_slots.assign_gpus(arguments.gpus)
    lifetime = Lifetime(arguments.owner)
    threading.Thread(target=lifetime.watch, name="watch", daemon=True).start()
    serve(socket.socket(fileno=arguments.listener), lifetime)


if __name__ == "__main__":
    main()
