"""The Spark worker's side of a scorer process: slices out, scored rows in, and nothing lost where the process dies.

Input: Spark's batches; output: batches of SCORED_SCHEMA. Starts the process of its place where it is not there. Where
it dies, starts another one and asks again, one slice at a time, and a slice that ends it again in halves, down to the
row that does: this is the failure scorer_crashed, all else is scored. Holds a bounded number of slices. Owns no models.
Executor side; a retried task takes the place again and finds the process that its first try left.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.workers.ahead import Ahead
from miniplm_udf.workers.engine import SLICES_AHEAD
from miniplm_udf.workers.places import ScorerPlace, take_scorer_place
from miniplm_udf.workers.scorer_wire import Gone, Wire, from_ipc, to_ipc
from miniplm_udf.workers.slices import Failed, full_slices, rows_by_alias, scored_rows
from miniplm_udf.workers.tally import Tally
from miniplm_udf.workers.worker_scorers import ScorerLike

LOGGER = logging.getLogger("miniplm.udf")

# Unanswered slices. The process takes in as many while its main thread waits for us, so that neither end ever waits
# for the other to read.
_SLICES_SENT = SLICES_AHEAD + 1
_SLICES_READ = 2
# Deaths of a place's process without an answer between, in this task or those before it, before the machine is to
# blame. Halving meets fewer: of two halves one is mostly harmless, and is answered. A slice with four fatal texts, far
# apart, takes eight.
MAX_DEATHS = 12
# The kernel's out-of-memory killer can hit a model that would fit a moment later; a second time it does not fit.
_MAX_DEATHS_WHILE_LOADING = 2
_EXIT_SECONDS = 10.0
# Where neither input nor an answer is there: how soon either is taken.
_LOOK_EVERY_SECONDS = 0.01
# Processes that this worker started, by their socket: their exit is told to no other.
_STARTED: dict[str, subprocess.Popen[bytes]] = {}

Factories = Mapping[str, Callable[[], ScorerLike]]


def score_in_process(
    factories: Factories, kept: Sequence[str], batches: Iterator[pa.RecordBatch], counts: Tally
) -> Iterator[pa.RecordBatch]:
    """Scores with the models of a scorer process.

    Args:
        factories: by alias, makers with a `key`.
        kept: columns that come out as they went in, the instance's id first.
        batches: columns of `udf.SCORE_REQUEST_DDL`.
        counts: takes the counts.

    Raises:
        ModelLoadError: a model cannot be loaded, or the process dies over it.
        ScoringError: the process dies whatever it is given.
        MiniplmError: what the process raised, by class and message.
    """
    first = next(batches, None)
    if first is None:
        return
    with contextlib.ExitStack() as held:
        place = held.enter_context(contextlib.closing(take_scorer_place([_key(one) for one in factories.values()])))
        process = held.enter_context(contextlib.closing(_Process(place, _question(place, factories, kept, first))))
        task = _Task(place, process, kept, counts)
        task.open()
        read = full_slices(itertools.chain((first,), batches), lambda: process.slice_bytes)
        slices = held.enter_context(Ahead(read, _SLICES_READ))
        yield from task.run(slices)


def _key(factory: Any) -> str:
    return str(factory.key)


def _question(place: ScorerPlace, factories: Factories, kept: Sequence[str], first: pa.RecordBatch) -> dict[str, Any]:
    """What a task tells the process once."""
    try:
        # As Spark sends functions: with what is not in a module.
        from pyspark import cloudpickle as pickle
    except ImportError:
        import pickle
    return {
        "daemon": place.daemon,
        "path": _path(),
        "factories": pickle.dumps(dict(factories)),
        "kept": list(kept),
        "aliases": list(rows_by_alias(first.column("model_ids"))),
    }


def _path() -> list[str]:
    """Where this worker finds its modules; Spark adds to it what came with `--py-files`."""
    return [path or os.getcwd() for path in sys.path]


class _Died(Exception):
    """The process is no more. `how` it ended, and `while_loading` what, if not while it scored."""

    def __init__(self, how: str, while_loading: str | None) -> None:
        super().__init__(how)
        self.how, self.while_loading = how, while_loading


class _Process:
    """The process of a place, as one task sees it."""

    def __init__(self, place: ScorerPlace, question: dict[str, Any]) -> None:
        self._place, self._question = place, question
        self._wire: Wire | None = None
        self._loading: str | None = None
        self._last_words = ""
        self.slice_bytes = 0

    @property
    def is_open(self) -> bool:
        return self._wire is not None

    def open(self) -> None:
        """Connects, starts the process where it is not there, and waits until models are loaded.

        Raises:
            _Died: over it.
        """
        self._loading, self._last_words = "its start", ""
        self._wire = Wire(self._connected())
        self._send("open", self._question)
        (self.slice_bytes,) = self._receive("ready")
        self._loading = None

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def send(self, rows: pa.RecordBatch) -> None:
        """Sends a slice. Where it cannot arrive, `answer` will say why."""
        self._send("slice", to_ipc([rows]))

    def answer(self) -> tuple[list[pa.RecordBatch], Tally]:
        """The scored rows of the first slice that is unanswered.

        Raises:
            _Died: before it answered.
            MiniplmError: that it raised.
        """
        stream, tally = self._receive("scored")
        return from_ipc(stream), tally

    def has_answer(self, patience_seconds: float) -> bool:
        """Whether `answer` would not wait, now or before patience is at its end."""
        assert self._wire is not None
        return self._wire.has_message(patience_seconds)

    def _connected(self) -> socket.socket:
        try:
            return _connection(self._place)
        except (FileNotFoundError, ConnectionRefusedError):
            _STARTED[str(self._place.socket)] = _start(self._place)
            return _connection(self._place)

    def _send(self, *message: Any) -> None:
        assert self._wire is not None
        with contextlib.suppress(Gone):
            self._wire.send(*message)

    def _receive(self, kind: str) -> tuple[Any, ...]:
        """The values of the next message of a kind; takes note of others that come before it."""
        assert self._wire is not None
        while True:
            try:
                found, *values = self._wire.receive()
            except Gone:
                raise self._died() from None
            if found == kind:
                return tuple(values)
            if found == "error":
                raise getattr(errors, values[0])(values[1])
            if found == "dying":
                (self._last_words,) = values
            elif found == "loading":
                self._loading = f"loading {values[0]}"
            elif found == "loaded":
                self._loading, self.slice_bytes = None, values[0]

    def _died(self) -> _Died:
        self.close()
        how = _ending(_STARTED.pop(str(self._place.socket), None))
        return _Died(f"{how}: {self._last_words}" if self._last_words else how, self._loading)


def _connection(place: ScorerPlace) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(place.socket))
    except OSError:
        connection.close()
        raise
    return connection


def _start(place: ScorerPlace) -> subprocess.Popen[bytes]:
    """Starts the process of a place: a fresh interpreter with this one's modules, and no CUDA from a fork.

    The socket is made here, where the place is held, so that nobody has to wait until the process listens.
    """
    place.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.socket))
        listener.listen()
        command = [sys.executable, "-P", "-m", "miniplm_udf.workers.scorer_process"]
        command += ["--listener", str(listener.fileno()), "--owner", str(place.owner)]
        command += [] if place.gpu is None else ["--gpu", place.gpu]
        started = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_path())},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
    LOGGER.info("scorer process %d started for %s", started.pid, place.socket)
    return started


def _ending(process: subprocess.Popen[bytes] | None) -> str:
    """How a process ended; only the worker that started it is told."""
    if process is None:
        return "ended, as its log may tell"
    try:
        code = process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed the connection, as its log may tell"
    if code >= 0:
        return f"ended with exit code {code}, as its log may tell"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}{', perhaps by the kernel for lack of memory' if -code == signal.SIGKILL else ''}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """A stretch of a slice's rows, and how often the process died over it with nothing else to do."""

    start: int
    rows: int
    deaths: int = 0

    def halves(self) -> "list[_Part]":
        half = self.rows // 2
        halves = [(self.start, half), (self.start + half, self.rows - half)]
        return [_Part(start, rows, self.deaths + 1) for start, rows in halves if rows]


class _Task:
    """Scores the slices of one task, whatever becomes of the process."""

    def __init__(self, place: ScorerPlace, process: _Process, kept: Sequence[str], counts: Tally) -> None:
        self._place, self._process, self._kept, self._counts = place, process, list(kept), counts
        self._deaths_while_loading = 0

    def open(self) -> None:
        """Has the process ready.

        Raises:
            ModelLoadError, ScoringError: it dies over it, again.
        """
        while not self._process.is_open:
            try:
                self._process.open()
            except _Died as death:
                self._note(death)

    def run(self, slices: Ahead[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Scores slices in their order, several of them on their way at a time."""
        sent: deque[pa.RecordBatch] = deque()
        more = True
        while more or sent:
            while more and len(sent) < _SLICES_SENT:
                # Input that is not there yet is waited for only while there is no answer to take.
                if sent and not slices.ready:
                    if self._process.has_answer(_LOOK_EVERY_SECONDS):
                        break
                    continue
                rows = next(slices, None)
                more = rows is not None
                if rows is not None:
                    self.open()
                    self._process.send(rows)
                    sent.append(rows)
            if not sent:
                return
            answered = self._answer()
            if answered is not None:
                sent.popleft()
                yield from answered
            while answered is None and sent:
                yield from self._alone(sent.popleft())

    def _answer(self) -> list[pa.RecordBatch] | None:
        """The next answer; None where the process died over it, or over what came behind it."""
        try:
            return self._take()
        except _Died as death:
            self._note(death)
            return None

    def _take(self) -> list[pa.RecordBatch]:
        batches, tally = self._process.answer()
        self._counts.add(tally)
        self._deaths_while_loading = 0
        if self._place.deaths:
            self._place.deaths = 0
        return batches

    def _alone(self, rows: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Scores a slice with nothing else on its way; where the process dies over it, by halves.

        A row is given up when it was alone and its process died, and not for the first time over it.
        """
        done: dict[int, list[pa.RecordBatch]] = {}
        # Large parts first: of one that is answered much is known to be harmless.
        todo = deque([_Part(0, rows.num_rows)])
        while todo:
            part = todo.popleft()
            asked = rows.slice(part.start, part.rows)
            try:
                self.open()
                self._process.send(asked)
                done[part.start] = self._take()
            except _Died as death:
                self._note(death)
                if death.while_loading is not None:
                    todo.appendleft(part)
                elif part.rows == 1 and part.deaths:
                    done[part.start] = self._given_up(asked, death)
                else:
                    todo.extend(part.halves())
        return [batch for start in sorted(done) for batch in done[start]]

    def _note(self, death: _Died) -> None:
        """Takes note of a death.

        Raises:
            ModelLoadError: loading is what it dies over.
            ScoringError: it dies over everything.
        """
        LOGGER.warning("the scorer process was lost over %s: %s", death.while_loading or "scoring", death.how)
        if death.while_loading is not None:
            self._deaths_while_loading += 1
            if self._deaths_while_loading >= _MAX_DEATHS_WHILE_LOADING:
                raise errors.ModelLoadError(
                    f"the scorer process died over {death.while_loading}, {self._deaths_while_loading} times: "
                    f"{death.how}; look at the executor's log, and at the memory that the model needs"
                )
            return
        self._place.deaths += 1
        if self._place.deaths >= MAX_DEATHS:
            raise errors.ScoringError(
                f"the scorer process died {self._place.deaths} times and scored nothing between, at last {death.how}; "
                f"that is not the texts: look at the executor's log and memory"
            )

    def _given_up(self, row: pa.RecordBatch, death: _Died) -> list[pa.RecordBatch]:
        kept, batches = row.select(self._kept), []
        for alias in rows_by_alias(row.column("model_ids")):
            failed = Failed("scorer_crashed", f"the scorer process was lost over this text: {death.how}")
            batch, tally = scored_rows(kept, alias, [failed])
            self._counts.add(tally)
            batches.append(batch)
        LOGGER.warning("%s is rejected: %s", kept.column(0)[0], death.how)
        return batches
