"""Runs the streaming queries of a command: leases, start, progress, stalls, recovery, and a clean stop. Driver only.

Input: `Query` objects. They run at the same time, until all input is read or until a signal (`stream.trigger`). If one
fails, the others are stopped and its error is raised, with its own class if it is a `MiniplmError`. After SIGTERM or
SIGINT the running micro-batches finish and no other begins; a second signal ends the command at once. A rerun continues
from the last finished micro-batch, however this run ended. Owns the records under `<root>/_status/` and
`<root>/_leases/`, and the file of facts next to each checkpoint; owns no table.
"""

import contextlib
import json
import logging
import queue
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf.config.sections import StreamConfig
from miniplm_udf.errors import ConfigError, MiniplmError
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease
from miniplm_udf.stopping import Stopped
from miniplm_udf.storage import Json
from miniplm_udf.streams import facts
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.query import Query, StartAgain, checkpoint_query_id
from miniplm_udf.streams.spark_log import QUERY_LOGGER, silenced
from miniplm_udf.streams.status import QueryStatus
from miniplm_udf.streams.watchdog import Watchdog, running_tasks, stage_activity
from miniplm_udf.task_progress import QueryCounts, publish
from miniplm_udf.workers.remote import error_in_text

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery, StreamingQueryListener

LOGGER = logging.getLogger("miniplm.streams")

_POLL_SECONDS = 0.5
# Shortest time between two status records: the backlog in them comes from a table's history, which is slow to read.
_STATUS_SECONDS = 10.0
_IDLE_STATUS_SECONDS = 60.0
# Longest wait for the last events of a query, which arrive after its end.
_EVENTS_SECONDS = 10.0
# The source gained a column: the stream has to be made again, and then continues.
_SCHEMA_CHANGED = re.compile(r"\[(DELTA_SCHEMA_CHANGED|DELTA_STREAMING_METADATA|DELTA_STREAMING_SCHEMA)\w*[.\]]")


class _Stopping(Exception):
    """Raised instead of beginning a micro-batch after a signal."""


class _Running:
    """A query of this run.

    Attributes:
        handle: Spark's query; None before its start and after its end.
        failures: errors that its micro-batches raised.
        busy: whether Python code of a micro-batch is running.
        events: Spark's progress events, and None at the query's end.
        restart: after a micro-batch raised `StartAgain`, keeps Spark's log silent until the restart; else None.
        offset: where the newest finished micro-batch ended; None before the first is finished.
        waited: how much waited when the command began, in the query's unit; None before it was counted.
        started_at: when the query was first started, by the monotonic clock in seconds.
        written_at: when the status was last written, by the monotonic clock in seconds.
        has_news: whether a micro-batch was finished since then.
    """

    def __init__(self, query: Query, leases: list[Lease], run_id: str) -> None:
        self.query, self.leases = query, leases
        self.failures: list[MiniplmError] = []
        self.busy = False
        self.events: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        self.handle: StreamingQuery | None = None
        self.status = QueryStatus(
            query=query.name, lease=query.facts.lease, run_id=run_id, backlog_unit=query.backlog_unit,
            started_at=statuses.now(),
        )  # fmt: skip
        self.restart: contextlib.ExitStack | None = None
        self.offset: Any = None
        self.waited: int | None = None
        self.started_at = time.monotonic()
        self.written_at, self.has_news = 0.0, False

    def counts(self, has_end: bool) -> QueryCounts:
        """Returns the counts of the status, for people.

        Args:
            has_end: whether the query ends when it has read what waited.
        """
        status = self.status
        return QueryCounts(
            rows=status.rows, rows_per_second=status.rows_per_second, tokens_per_second=status.tokens_per_second,
            behind=status.backlog, total=self.waited if has_end else None, unit=self.query.backlog_unit,
            began_at=self.started_at, outputs_per_row=self.query.outputs_per_row,
        )  # fmt: skip


class QueryRunner:
    """Runs the queries of one command over one root.

    Args:
        spark: the command's session.
        root: URI under which leases and status records are kept.
        config: trigger, interval, watchdog and metrics port.
    """

    def __init__(self, spark: "SparkSession", root: str, config: StreamConfig) -> None:
        self._spark, self._root, self._config = spark, root, config
        self._stop = threading.Event()
        self._signal = int(signal.SIGTERM)
        self._quiet_log = False
        self._running: list[_Running] = []
        self._run_id = uuid.uuid4().hex

    def run(self, queries: Sequence[Query]) -> None:
        """Runs the queries until all have ended; with processing_time, until a signal asks to stop.

        Args:
            queries: the queries, each with its own checkpoint. All leases are taken before the first query starts.

        Raises:
            CorpusError: another driver runs one of the queries.
            Stopped: a signal came before all input was read.
            MiniplmError: a micro-batch, or an executor, raised it.
            StreamingQueryException: a query failed with any other error.
        """
        watchdog = Watchdog(lambda: stage_activity(self._spark))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._metrics())
            # All leases are taken before the first query starts: if a lease is refused, no query has begun.
            leases = [[stack.enter_context(lease) for lease in self._leases(query)] for query in queries]
            stack.enter_context(self._signals())
            self._running = [_Running(q, held, self._run_id) for q, held in zip(queries, leases, strict=True)]
            listen = stack.enter_context(self._listening())
            stack.callback(self._end_all)
            for running in self._running:
                self._start(running, listen)
            while active := [running for running in self._running if running.handle is not None]:
                if self._stop.is_set():
                    self._quiet_logs()
                for running in active:
                    self._poll(running, listen)
                self._check_stall(watchdog)
        if self._stop.is_set() and self._config.trigger == "available_now":
            raise Stopped(self._signal, " before all input was read")

    def _leases(self, query: Query) -> list[Lease]:
        waits = query.waits and self._config.trigger == "available_now"
        return [Lease(Root(self._root).lease(name), query.name, waits) for name in (query.facts.lease, *query.also)]

    def _start(self, running: _Running, listen: Callable[["SparkSession"], None]) -> None:
        frame = running.query.source()
        facts.record(running.query.checkpoint_uri, running.query.facts)
        listen(frame.sparkSession)

        def guarded(batch: "DataFrame", batch_id: int) -> None:
            if self._stop.is_set():
                raise _Stopping
            running.busy = True
            try:
                for lease in running.leases:
                    lease.check()
                query_id = checkpoint_query_id(batch.sparkSession, running.query.checkpoint_uri)
                running.query.micro_batch(batch, query_id, batch_id)
            except MiniplmError as error:
                running.failures.append(error)
                raise
            except StartAgain:
                running.restart = contextlib.ExitStack()
                running.restart.enter_context(silenced(self._spark, [QUERY_LOGGER]))
                raise
            finally:
                running.busy = False

        writer = frame.writeStream.foreachBatch(guarded).queryName(running.query.name)
        writer = writer.option("checkpointLocation", running.query.checkpoint_uri)
        if self._config.trigger == "available_now":
            writer = writer.trigger(availableNow=True)
        else:
            writer = writer.trigger(processingTime=f"{self._config.interval_seconds} seconds")
        running.handle = writer.start()
        self._write_status(running)

    def _poll(self, running: _Running, listen: Callable[["SparkSession"], None]) -> None:
        from pyspark.errors import StreamingQueryException

        assert running.handle is not None
        try:
            if running.handle.awaitTermination(_POLL_SECONDS):
                return self._ended(running, "stopped")
        except StreamingQueryException as error:
            if self._starts_again(running, error):
                return self._start(running, listen)
            return self._ended(running, "stopped")
        self._take_events(running)
        if time.monotonic() - running.written_at >= (_STATUS_SECONDS if running.has_news else _IDLE_STATUS_SECONDS):
            self._write_status(running)
        if self._stop.is_set() and not running.busy and not running.handle.status["isTriggerActive"]:
            # No micro-batch runs. A micro-batch that begins at this moment is interrupted, and the next run replays it.
            running.handle.stop()
            self._ended(running, "stopped")

    def _starts_again(self, running: _Running, error: "StreamingQueryException") -> bool:
        """Whether to start a failed query again; False if it failed only because it was asked to stop.

        Raises:
            MiniplmError, StreamingQueryException: the error that the query failed with.
        """
        if self._stop.is_set() and _Stopping.__name__ in str(error):
            return False
        if running.restart is not None:
            running.restart.close()
            running.restart = None
            LOGGER.info("%s: starting again", running.query.name)
            return True
        ours = running.failures[0] if running.failures else error_in_text(error)
        if ours is None and (_SCHEMA_CHANGED.search(str(error)) or running.query.recover(error)):
            LOGGER.info("%s: starting again", running.query.name)
            return True
        running.status.error = str(ours or error).splitlines()[0]
        self._ended(running, "failed")
        if ours is not None:
            raise ours from error
        raise error

    def _ended(self, running: _Running, state: str) -> None:
        running.handle = None
        deadline = time.monotonic() + _EVENTS_SECONDS
        while time.monotonic() < deadline and not self._take_events(running, wait_seconds=0.2):
            pass
        running.status.state = state
        self._write_status(running)
        publish(running.query.name, None)

    def _end_all(self) -> None:
        """Stops all running queries at once, after another query failed or a second signal came."""
        for running in self._running:
            if running.handle is not None:
                running.handle.stop()
                self._ended(running, "stopped")

    def _quiet_logs(self) -> None:
        """Silences Spark and py4j, which would log each refused micro-batch as an error with its trace."""
        if not self._quiet_log:
            self._quiet_log = True
            LOGGER.warning("stopping after the running micro-batches; a second signal stops at once")
            self._spark.sparkContext.setLogLevel("OFF")
            logging.getLogger("py4j.clientserver").setLevel(logging.CRITICAL)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[Callable[["SparkSession"], None]]:
        """Receives the queries' progress. Yields a function that adds the listener to a session that runs a query."""
        listener = _listener({running.query.name: running.events for running in self._running})
        sessions: list[SparkSession] = []

        def listen(session: "SparkSession") -> None:
            if not any(session is other for other in sessions):
                session.streams.addListener(listener)
                sessions.append(session)

        try:
            yield listen
        finally:
            for session in sessions:
                session.streams.removeListener(listener)

    def _take_events(self, running: _Running, wait_seconds: float = 0.0) -> bool:
        """Updates the status with the events that have arrived; returns whether the query's end is among them."""
        ended = False
        with contextlib.suppress(queue.Empty):
            while not ended:
                progress = running.events.get(timeout=wait_seconds) if wait_seconds else running.events.get_nowait()
                ended = progress is None
                # Spark also sends progress events for triggers that found no new input.
                if progress is not None and "addBatch" in progress["durationMs"]:
                    self._add(running, progress)
        return ended

    def _add(self, running: _Running, progress: Json) -> None:
        end = progress["sources"][0]["endOffset"]
        running.offset = json.loads(end) if isinstance(end, str) else end
        running.status.add_batch(
            int(progress["batchId"]), int(progress["numInputRows"]),
            progress["durationMs"]["triggerExecution"] / 1000, dict(running.query.tokens()),
        )  # fmt: skip
        running.has_news = True
        self._publish(running)
        LOGGER.info("%s", running.status.line())

    def _publish(self, running: _Running) -> None:
        publish(running.query.name, running.counts(has_end=self._config.trigger == "available_now"))

    def _write_status(self, running: _Running) -> None:
        try:
            running.status.backlog = running.query.backlog(running.offset)
        except Exception as error:
            # Files of the log may be removed while it is read. A missing count is no reason to end a service.
            LOGGER.warning("%s: the backlog cannot be counted now: %s", running.query.name, str(error).splitlines()[0])
        if running.waited is None:
            running.waited = running.status.backlog
        self._publish(running)
        statuses.write(self._root, running.status)
        running.written_at, running.has_news = time.monotonic(), False

    def _check_stall(self, watchdog: Watchdog) -> None:
        quiet = watchdog.quiet_seconds()
        stalled = quiet if quiet >= self._config.stalled_seconds else 0.0
        for running in self._running:
            was_stalled = running.status.stalled_seconds > 0
            running.status.stalled_seconds = round(stalled if running.busy else 0.0, 1)
            is_stalled = running.status.stalled_seconds > 0
            if is_stalled and not was_stalled:
                LOGGER.warning(
                    "%s: no progress for %.0f s: %s", running.query.name, quiet,
                    "; ".join(running_tasks(self._spark)) or "no task runs",
                )  # fmt: skip
            if is_stalled != was_stalled:
                statuses.write(self._root, running.status)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT while queries run. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            # Only sets a flag, because the main thread may be in the middle of a call to Java.
            if self._stop.is_set() and callable(end := before[signal.Signals(number)]):
                end(number, frame)
            self._signal = number
            self._stop.set()

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[None]:
        """Serves the statuses as Prometheus text, if the config has `stream.metrics_port`."""
        if self._config.metrics_port is None:
            yield
            return
        from prometheus_client import start_http_server

        registry = statuses.prometheus_registry(lambda: [running.status for running in self._running])
        try:
            server, thread = start_http_server(self._config.metrics_port, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"stream.metrics_port: expected a free port, found that {self._config.metrics_port} cannot be opened "
                f"({error}); choose another port"
            ) from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _listener(events: dict[str, "queue.SimpleQueue[Json | None]"]) -> "StreamingQueryListener":
    """A listener that puts each query's progress, and None at its end, into the query's queue (by query name)."""
    from pyspark.sql.streaming import StreamingQueryListener

    names: dict[str, str] = {}

    class ProgressListener(StreamingQueryListener):
        def onQueryStarted(self, event: Any) -> None:
            names[str(event.runId)] = event.name

        def onQueryProgress(self, event: Any) -> None:
            if event.progress.name in events:
                events[event.progress.name].put(json.loads(event.progress.json))

        def onQueryIdle(self, event: Any) -> None:
            pass

        def onQueryTerminated(self, event: Any) -> None:
            if (name := names.get(str(event.runId))) in events:
                events[name].put(None)

    return ProgressListener()
