"""Runs the streaming queries of a command: leases, start, progress, stalls, recovery, and a clean stop. Driver only.

Input: `Query` objects. They run at once, to the end of what is there or for ever (`stream.trigger`); where one fails,
the others are stopped and its error is raised, ours as it was. SIGTERM (or SIGINT) lets the running micro-batches
finish and begins no other; a second one stops at once. A rerun goes on where this one was, however it ended. Owns the
records under `<root>/_status/` and `<root>/_leases/`, and no table.
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

from miniplm_udf.config import StreamConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.lease import Lease, lease_uri
from miniplm_udf.streams.query import Query, checkpoint_query_id, executor_error
from miniplm_udf.streams.status import QueryStatus
from miniplm_udf.streams.watchdog import Watchdog, running_tasks, stage_activity

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery, StreamingQueryListener

LOGGER = logging.getLogger("miniplm.streams")

_POLL_SECONDS = 0.5
# Reading a table's history for its backlog takes a moment: not after each of many small micro-batches.
_TELL_SECONDS = 10.0
_IDLE_TELL_SECONDS = 60.0
# The last events of a query come behind its end.
_EVENTS_SECONDS = 10.0
# A source that gained a column: the stream has to be made anew, and then goes on.
_SCHEMA_CHANGED = re.compile(r"\[(DELTA_SCHEMA_CHANGED|DELTA_STREAMING_METADATA|DELTA_STREAMING_SCHEMA)\w*[.\]]")


class _Stopping(Exception):
    """Raised in place of a micro-batch that is not to be begun."""


class _Running:
    """A query of a run. `handle` is None before its start and after its end.

    Attributes:
        failures: what its micro-batches raised.
        busy: a micro-batch of it is at work in Python.
        events: Spark's progress, and None for the end.
        offset: where the newest finished micro-batch ended.
        has_news: something has happened since the status was written.
    """

    def __init__(self, query: Query, leases: list[Lease], run_id: str) -> None:
        self.query, self.leases = query, leases
        self.failures: list[MiniplmError] = []
        self.busy = False
        self.events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.handle: StreamingQuery | None = None
        self.status = QueryStatus(
            query=query.name, lease=query.lease, run_id=run_id, backlog_unit=query.backlog_unit,
            started_at=statuses.now(),
        )  # fmt: skip
        self.offset: Any = None
        self.told_at, self.has_news = 0.0, False


class QueryRunner:
    """Runs queries over one root.

    Args:
        spark: the command's session.
        root: where leases and status records are.
        config: trigger, interval, watchdog, metrics.
    """

    def __init__(self, spark: "SparkSession", root: str, config: StreamConfig) -> None:
        self._spark, self._root, self._config = spark, root, config
        self._stop = threading.Event()
        self._quiet_log = False
        self._running: list[_Running] = []
        self._run_id = uuid.uuid4().hex

    def run(self, queries: Sequence[Query]) -> None:
        """Runs the queries until all have ended; with processing_time, until a signal asks to stop.

        Raises:
            CorpusError: another driver runs one of them; asked to stop before the end of what is there.
            MiniplmError: ours, from a micro-batch or an executor.
        """
        watchdog = Watchdog(lambda: stage_activity(self._spark))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            stack.enter_context(self._metrics())
            # Before the first start: where one is refused, none has begun.
            leases = [[stack.enter_context(lease) for lease in self._leases(query)] for query in queries]
            self._running = [_Running(q, held, self._run_id) for q, held in zip(queries, leases, strict=True)]
            listen = stack.enter_context(self._listening())
            stack.callback(self._end_all)
            for one in self._running:
                self._start(one, listen)
            while active := [one for one in self._running if one.handle is not None]:
                if self._stop.is_set():
                    self._hush()
                for one in active:
                    self._look_after(one, listen)
                self._watch(watchdog)
        if self._stop.is_set() and self._config.trigger == "available_now":
            raise CorpusError("stopped by a signal before the end of what is there; run again to go on from here")

    def _leases(self, query: Query) -> list[Lease]:
        waits = query.waits and self._config.trigger == "available_now"
        return [Lease(lease_uri(self._root, name), query.name, waits) for name in (query.lease, *query.also)]

    def _start(self, one: _Running, listen: Callable[["SparkSession"], None]) -> None:
        frame = one.query.source()
        listen(frame.sparkSession)

        def guarded(batch: "DataFrame", batch_id: int) -> None:
            if self._stop.is_set():
                raise _Stopping
            one.busy = True
            try:
                for lease in one.leases:
                    lease.check()
                query_id = checkpoint_query_id(batch.sparkSession, one.query.checkpoint_uri)
                one.query.micro_batch(batch, query_id, batch_id)
            except MiniplmError as error:
                one.failures.append(error)
                raise
            finally:
                one.busy = False

        writer = frame.writeStream.foreachBatch(guarded).queryName(one.query.name)
        writer = writer.option("checkpointLocation", one.query.checkpoint_uri)
        if self._config.trigger == "available_now":
            writer = writer.trigger(availableNow=True)
        else:
            writer = writer.trigger(processingTime=f"{self._config.interval_seconds} seconds")
        one.handle = writer.start()
        self._tell(one)

    def _look_after(self, one: _Running, listen: Callable[["SparkSession"], None]) -> None:
        from pyspark.errors import StreamingQueryException

        assert one.handle is not None
        try:
            if one.handle.awaitTermination(_POLL_SECONDS):
                return self._ended(one, "stopped")
        except StreamingQueryException as error:
            if self._may_go_on(one, error):
                return self._start(one, listen)
            return self._ended(one, "stopped")
        self._take_events(one)
        if time.monotonic() - one.told_at >= (_TELL_SECONDS if one.has_news else _IDLE_TELL_SECONDS):
            self._tell(one)
        if self._stop.is_set() and not one.busy and not one.handle.status["isTriggerActive"]:
            # Between two micro-batches; one that begins at this moment is interrupted, and replayed by the next run.
            one.handle.stop()
            self._ended(one, "stopped")

    def _may_go_on(self, one: _Running, error: "StreamingQueryException") -> bool:
        """Whether a query that failed is to be started again; False where it failed because it was to stop.

        Raises:
            MiniplmError, StreamingQueryException: what failed it.
        """
        if self._stop.is_set() and _Stopping.__name__ in str(error):
            return False
        ours = one.failures[0] if one.failures else executor_error(error)
        if ours is None and (_SCHEMA_CHANGED.search(str(error)) or one.query.recover(error)):
            LOGGER.info("%s: starting again", one.query.name)
            return True
        one.status.error = str(ours or error).splitlines()[0]
        self._ended(one, "failed")
        if ours is not None:
            raise ours from error
        raise error

    def _ended(self, one: _Running, state: str) -> None:
        one.handle = None
        deadline = time.monotonic() + _EVENTS_SECONDS
        while time.monotonic() < deadline and not self._take_events(one, wait_seconds=0.2):
            pass
        one.status.state = state
        self._tell(one)

    def _end_all(self) -> None:
        """Stops what still runs, at once: another one failed, or a second signal came."""
        for one in self._running:
            if one.handle is not None:
                one.handle.stop()
                self._ended(one, "stopped")

    def _hush(self) -> None:
        """Before a micro-batch is refused: Spark and py4j log that as an error, with its trace."""
        if not self._quiet_log:
            self._quiet_log = True
            LOGGER.warning("stopping after the running micro-batches; a second signal stops at once")
            self._spark.sparkContext.setLogLevel("OFF")
            logging.getLogger("py4j.clientserver").setLevel(logging.CRITICAL)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[Callable[["SparkSession"], None]]:
        """Hears of the queries' progress. Gives a function that listens to a session too: each has its own queries."""
        listener = _listener({one.query.name: one.events for one in self._running})
        heard: list[SparkSession] = []

        def listen(session: "SparkSession") -> None:
            if not any(session is known for known in heard):
                session.streams.addListener(listener)
                heard.append(session)

        try:
            yield listen
        finally:
            for session in heard:
                session.streams.removeListener(listener)

    def _take_events(self, one: _Running, wait_seconds: float = 0.0) -> bool:
        """Brings the status up to what was heard; whether the query's end is among it."""
        ended = False
        with contextlib.suppress(queue.Empty):
            while not ended:
                progress = one.events.get(timeout=wait_seconds) if wait_seconds else one.events.get_nowait()
                ended = progress is None
                # Looks at a source without news are told as progress too.
                if progress is not None and "addBatch" in progress["durationMs"]:
                    self._add(one, progress)
        return ended

    def _add(self, one: _Running, progress: dict[str, Any]) -> None:
        end = progress["sources"][0]["endOffset"]
        one.offset = json.loads(end) if isinstance(end, str) else end
        one.status.add_batch(
            int(progress["batchId"]), int(progress["numInputRows"]),
            progress["durationMs"]["triggerExecution"] / 1000, dict(one.query.tokens()),
        )  # fmt: skip
        one.has_news = True
        LOGGER.info("%s", one.status.line())

    def _tell(self, one: _Running) -> None:
        try:
            one.status.backlog = one.query.backlog(one.offset)
        except Exception as error:
            # A log may be tidied up while it is counted; a number that is not known for a while ends no service.
            LOGGER.warning("%s: what waits cannot be counted now: %s", one.query.name, str(error).splitlines()[0])
        statuses.write(self._root, one.status)
        one.told_at, one.has_news = time.monotonic(), False

    def _watch(self, watchdog: Watchdog) -> None:
        quiet = watchdog.quiet_seconds()
        stalled = quiet if quiet >= self._config.stalled_seconds else 0.0
        for one in self._running:
            was, one.status.stalled_seconds = one.status.stalled_seconds, round(stalled if one.busy else 0.0, 1)
            if one.status.stalled_seconds and not was:
                LOGGER.warning(
                    "%s: nothing has moved for %.0f s: %s", one.query.name, quiet,
                    "; ".join(running_tasks(self._spark)) or "no task runs",
                )  # fmt: skip
            if bool(one.status.stalled_seconds) != bool(was):
                statuses.write(self._root, one.status)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT while queries run. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, frame: Any) -> None:
            # Nothing but this: the main thread may be in the middle of talking to Java.
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[None]:
        """Serves the statuses as Prometheus text, where the config gives a port."""
        if self._config.metrics_port is None:
            yield
            return
        from prometheus_client import start_http_server

        registry = statuses.prometheus_registry(lambda: [one.status for one in self._running])
        try:
            server, thread = start_http_server(self._config.metrics_port, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"stream.metrics_port: {self._config.metrics_port} cannot be listened on ({error}); choose another port"
            ) from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _listener(events: dict[str, "queue.SimpleQueue[dict[str, Any] | None]"]) -> "StreamingQueryListener":
    """Puts each query's progress, and None at its end, into its queue."""
    from pyspark.sql.streaming import StreamingQueryListener

    names: dict[str, str] = {}

    class Listener(StreamingQueryListener):
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

    return Listener()
