"""Holds models and scores for Spark workers, one task at a time: `python -m miniplm_udf.workers.scorer_process`.

Started by the first task of a place (`scorer_client`), in a session of its own; kept while its executor lives, so that
a model is loaded once although Spark ends idle workers after a minute, and so that a model's crash is not the worker's.
Input: slices over a unix socket; output: their scored rows and `Tally`, in order. While it scores a slice, a thread
reads and tokenizes the next ones. Work of a worker that is gone is dropped. Nothing is kept but the models.

It ends with its executor, with the Spark session, after half an hour without a task, or where another process waits for
its GPU while it is idle. Executor side. Its log goes to the executor's stderr.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from miniplm_udf.errors import MiniplmError, ModelLoadError, ScoringError
from miniplm_udf.progress import configure_logging
from miniplm_udf.workers import places
from miniplm_udf.workers.ahead import Ahead
from miniplm_udf.workers.engine import SLICES_AHEAD, Engine, Slice, loses_device
from miniplm_udf.workers.scorer_wire import Gone, Wire, from_ipc, to_ipc
from miniplm_udf.workers.worker_scorers import Kept, WorkerScorers

LOGGER = logging.getLogger("miniplm.udf")

# A model that nobody has used for so long is loaded anew when it is asked for.
IDLE_SECONDS = 1800.0
_LOOK_EVERY_SECONDS = 0.5
# The daemon of workers may be replaced while its executor lives: a task of the new one has so long to come.
_DAEMON_SECONDS = 1.0
# Work of a worker that is gone stops after a forward pass. One that takes longer than this has hung.
_DROP_SECONDS = 60.0
# For the kernel's out-of-memory killer: rather this process, which is replaced, than the executor's JVM.
_OOM_SCORE = "500"


class Life:
    """What this process lives for: its executor, and the worker that is connected."""

    def __init__(self, owner: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._owner = self._daemon = psutil.Process(owner)
        self._idle_seconds = idle_seconds
        self._connected = False
        self._since = time.monotonic()
        self._dropped_since: float | None = None

    def connected(self, daemon: int) -> None:
        """A worker has come, forked by this daemon."""
        self._connected, self._dropped_since = True, None
        with contextlib.suppress(psutil.NoSuchProcess):
            self._daemon = psutil.Process(daemon)

    def worker_is_gone(self) -> bool:
        return self._dropped_since is not None

    def lost_worker(self) -> None:
        """The worker's end of the connection is closed, though its work may still be going on here."""
        self._dropped_since = time.monotonic()

    def disconnected(self) -> None:
        self._connected, self._dropped_since = False, None
        self._since = time.monotonic()

    def reason_to_end(self) -> str | None:
        if places.is_gone(self._owner):
            return "its executor is gone"
        now = time.monotonic()
        if self._connected:
            hung = self._dropped_since is not None and now - self._dropped_since > _DROP_SECONDS
            return "it does not let go of the work of a worker that is gone" if hung else None
        idle = now - self._since
        if idle > _DAEMON_SECONDS and places.is_gone(self._daemon):
            return "the Spark session is gone"
        if idle > self._idle_seconds:
            return f"nobody has asked for {idle:.0f} s"
        return "another process waits for its GPU" if places.kept_place_is_wanted() else None

    def watch(self) -> None:
        """Ends this process when there is a reason to. For a thread."""
        while (reason := self.reason_to_end()) is None:
            time.sleep(_LOOK_EVERY_SECONDS)
        LOGGER.info("scorer process %d ends: %s", os.getpid(), reason)
        # Not through the interpreter's exit, which waits for the main thread and takes CUDA down.
        os._exit(0)


class ProcessScorers(WorkerScorers):
    """Scorers that tell the worker when they load a model, and stop when it is gone."""

    def __init__(self, factories: dict[str, Any], wire: Wire, life: Life) -> None:
        super().__init__(factories)
        self._wire, self._life = wire, life

    def progressed(self) -> None:
        if self._life.worker_is_gone():
            raise Gone

    def get(self, alias: str) -> Kept:
        if alias not in self._factories or self.made(alias) is not None:
            return super().get(alias)
        self._wire.send("loading", alias)
        try:
            found = super().get(alias)
        except MiniplmError:
            raise
        except Exception as error:
            LOGGER.exception("%s: cannot be loaded", alias)
            raise ModelLoadError(f"{alias}: cannot be loaded: {type(error).__name__}: {error}") from error
        self._wire.send("loaded", self.slice_bytes())
        return found


def serve(listener: socket.socket, life: Life) -> None:
    """Scores for whoever connects, one after the other, for ever."""
    while True:
        connection, _ = listener.accept()
        wire = Wire(connection)
        try:
            _score_for(wire, life)
        except Gone:
            LOGGER.warning("the worker is gone: its work is dropped")
        except MiniplmError as error:
            _tell(wire, "error", type(error).__name__, str(error))
        except BaseException as error:  # as data to the worker, which raises, or starts another process
            LOGGER.exception("scoring failed")
            words = f"{type(error).__name__}: {error}"
            if loses_device(error):
                _tell(wire, "dying", words)
                os._exit(os.EX_SOFTWARE)
            _tell(wire, "error", ScoringError.__name__, words)
        finally:
            wire.close()
            life.disconnected()


def _tell(wire: Wire, *message: str) -> None:
    with contextlib.suppress(Gone):
        wire.send(*message)


def _score_for(wire: Wire, life: Life) -> None:
    """Answers one task, to its end."""
    wire.send("hello", os.getpid())
    _, asked = wire.receive()
    life.connected(asked["daemon"])
    sys.path.extend(path for path in asked["path"] if path not in sys.path)
    scorers = ProcessScorers(_factories(asked["factories"]), wire, life)
    engine = Engine(scorers, asked["kept"])
    for alias in asked["aliases"]:
        scorers.get(alias)
    wire.send("ready", scorers.slice_bytes())
    with Ahead(_slices(wire, engine, life), SLICES_AHEAD) as slices:
        try:
            for rows in slices:
                batches, tally = engine.score(rows)
                wire.send("scored", to_ipc(batches), tally)
        finally:
            wire.stop_reading()


def _factories(pickled: bytes) -> dict[str, Any]:
    try:
        return dict(pickle.loads(pickled))
    except Exception as error:
        LOGGER.exception("factories cannot be unpickled")
        raise ScoringError(
            f"expected factories that the scorer process can unpickle, found {type(error).__name__}: {error}; what "
            f"they are made of must be on the path of the executor's Python"
        ) from error


def _slices(wire: Wire, engine: Engine, life: Life) -> Iterator[Slice]:
    """Prepared slices, until the worker closes the connection. Runs in the reading thread."""
    while True:
        try:
            _, stream = wire.receive()
        except Gone:
            life.lost_worker()
            return
        (rows,) = from_ipc(stream)
        yield engine.prepare(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Holds models and scores for the workers of one Spark executor.")
    parser.add_argument("--listener", type=int, required=True, help="file descriptor of the socket that listens")
    parser.add_argument("--owner", type=int, required=True, help="process that this one must not outlive")
    parser.add_argument("--gpu", help="address of the GPU that Spark assigned")
    given = parser.parse_args(argv)
    configure_logging()
    faulthandler.enable()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    places.assign_gpu(given.gpu)
    life = Life(given.owner)
    threading.Thread(target=life.watch, name="watch", daemon=True).start()
    serve(socket.socket(fileno=given.listener), life)


if __name__ == "__main__":
    main()
