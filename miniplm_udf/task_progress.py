"""Progress of work on Spark: finished tasks, and the rows and tokens of streaming queries. Driver only.

    score: 1,200 of 5,000 rows, 120.3 rows/s, teacher 9,341 tokens/s, 32 s left; 10 s so far

Input: Spark's status tracker, and the counts that the runner of queries publishes. Output: a bar on a terminal, drawn
twice a second; elsewhere a log line after 1.5 seconds and then every ten. Tasks are shown until rows are counted. While
one piece of work runs inside another, only the inner one is shown. Owns no table; imports no Spark.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf.progress import duration, is_terminal, time_left

if TYPE_CHECKING:
    from tqdm import tqdm

LOGGER = logging.getLogger("miniplm")

_FIRST_SECONDS = 1.5
_DRAW_SECONDS = 0.5
_JOIN_SECONDS = 10.0
# How often the metrics of running tasks are read, and in how many of the latest SQL executions.
_OUTPUTS_SECONDS = 5.0
_LATEST_EXECUTIONS = 8
_BAR = "{percentage:3.0f}%|{bar:20}| {desc}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryCounts:
    """How far a streaming query is.

    Attributes:
        rows: rows since the command began.
        rows_per_second: rate of the newest micro-batch with rows.
        tokens_per_second: rate of the newest micro-batch that scored, by model alias.
        behind: what still waits, in `unit`; None if it was not counted.
        total: what waited when the command began, in `unit`; None if the query goes on with new input.
        unit: rows or files.
        began_at: when the query began, by `time.monotonic`.
        outputs_per_row: rows that the query's Python workers return for each row that waits; None if they are not
            counted while a micro-batch runs.
        first_rows, first_at: rows of the first count above 0 while a micro-batch ran, and its time by
            `time.monotonic`: the models are loaded before, which says nothing about the time that is left.
    """

    rows: int
    rows_per_second: float
    tokens_per_second: Mapping[str, float]
    behind: int | None
    total: int | None
    unit: str
    began_at: float
    outputs_per_row: float | None = None
    first_rows: int = 0
    first_at: float | None = None

    def with_outputs(self, outputs: int) -> "QueryCounts":
        """Returns the counts with the rows of the running micro-batch, and their rate before the first one is finished.

        Args:
            outputs: rows that Python workers have returned in the running micro-batch.
        """
        if not self.outputs_per_row or not outputs:
            return self
        rows = self.rows + round(outputs / self.outputs_per_row)
        return dataclasses.replace(self, rows=rows, rows_per_second=self.rows_per_second or rows / self.seconds)

    @property
    def seconds(self) -> float:
        """The time since the query began."""
        return max(time.monotonic() - self.began_at, 1e-9)

    @property
    def fraction(self) -> float | None:
        """The share of the input that is done, 0 to 1; None if it is not known."""
        return self._done / self.total if self.total else None

    @property
    def _done(self) -> int:
        total = self.total or 0
        by_rows = self.rows if self.unit == "rows" else 0
        return min(total, max(by_rows, 0 if self.behind is None else total - self.behind))

    def text(self) -> str:
        """The counts in words."""
        rows = f"{self.rows:,} rows"
        if self.total and self.unit == "rows":
            rows = f"{self._done:,} of {self.total:,} rows"
        parts = [rows]
        if self.total and self.unit != "rows":
            parts.append(f"{self._done:,} of {self.total:,} {self.unit}")
        if self.rows_per_second:
            parts.append(f"{self.rows_per_second:,.1f} rows/s")
        parts += [f"{alias} {rate:,.0f} tokens/s" for alias, rate in sorted(self.tokens_per_second.items())]
        if self._left:
            parts.append(self._left)
        return ", ".join(parts)

    @property
    def _left(self) -> str | None:
        """The time that is left, in words; None if it cannot be told yet."""
        if not self.total or self.first_at is None:
            return time_left(self.fraction or 0.0, self.seconds)
        since_first = (self._done - self.first_rows) / max(self.total - self.first_rows, 1)
        return time_left(since_first, time.monotonic() - self.first_at)


# The running queries, by name; and the watchers of the running pieces of work, the innermost last.
_queries: dict[str, QueryCounts] = {}
_watchers: list["_Watcher | None"] = []


def publish(name: str, counts: QueryCounts | None) -> None:
    """Makes the counts of a streaming query visible to the piece of work that runs it.

    Args:
        name: name of the query.
        counts: the counts; None after its end.
    """
    if counts is None:
        _queries.pop(name, None)
    else:
        _queries[name] = counts


@contextlib.contextmanager
def watched_tasks(spark: Any, label: str, every_seconds: float = 10.0) -> Iterator[None]:
    """Shows the finished tasks of Spark's active stages and the counts of queries, while the block runs.

    Args:
        spark: a `SparkSession`. The annotation does not name it, because this module imports no Spark.
        label: start of each line.
        every_seconds: time between two lines where stderr is no terminal.
    """
    watcher = _Watcher(spark, label, every_seconds)
    with _innermost(watcher):
        thread = threading.Thread(target=watcher.run, name=label, daemon=True)
        thread.start()
        try:
            yield
        finally:
            watcher.has_ended.set()
            thread.join(_JOIN_SECONDS)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Shows nothing while the block runs, because a process that it has started shows its own progress."""
    with _innermost(None):
        yield


@contextlib.contextmanager
def _innermost(watcher: "_Watcher | None") -> Iterator[None]:
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class _Watcher:
    """Shows one piece of work, in a thread of its own.

    Attributes:
        has_ended: set when the work has ended.
    """

    def __init__(self, spark: Any, label: str, every_seconds: float) -> None:
        self.has_ended = threading.Event()
        self._spark, self._outputs = spark, _PythonOutputs(spark)
        self._tracker: Any = None
        self._label, self._every_seconds = label, every_seconds
        self._live: dict[str, QueryCounts] = {}
        self._started = time.monotonic()
        self._stages_since: dict[int, float] = {}
        self._bar: tqdm[Any] | None = None

    def run(self) -> None:
        """Shows the work until it has ended."""
        try:
            self._tracker = self._spark.sparkContext.statusTracker()
            if is_terminal():
                self._draw_bar()
            else:
                self._log_lines()
        except Exception as error:  # the JVM has ended, and the work says why; progress alone never fails it
            LOGGER.debug("%s: its progress cannot be read: %s", self._label, error)
        finally:
            if self._bar is not None:
                self._bar.close()

    def _log_lines(self) -> None:
        wait = min(_FIRST_SECONDS, self._every_seconds)
        while not self.has_ended.wait(wait):
            if self._is_innermost():
                LOGGER.info("%s", self._line()[0])
            wait = self._every_seconds

    def _draw_bar(self) -> None:
        from tqdm import tqdm

        while not self.has_ended.wait(_DRAW_SECONDS):
            if not self._is_innermost():
                if self._bar is not None:
                    self._bar.close()
                    self._bar = None
                continue
            text, fraction = self._line()
            if self._bar is None:
                # A terminal that does not know its width has 0 columns.
                width = shutil.get_terminal_size().columns - 1
                self._bar = tqdm(total=1.0, leave=False, ncols=width, bar_format="{desc}")
            self._bar.bar_format = "{desc}" if fraction is None else _BAR
            self._bar.n = fraction or 0.0
            self._bar.set_description_str(text)

    def _is_innermost(self) -> bool:
        return bool(_watchers) and _watchers[-1] is self

    def _line(self) -> tuple[str, float | None]:
        """Returns the line about the work, and the share of the work that is done; None if the share is not known."""
        queries = dict(_queries)
        if counted := [name for name, counts in queries.items() if counts.outputs_per_row]:
            queries[counted[0]] = self._with_outputs(counted[0], queries[counted[0]])
        several = len(queries) > 1
        parts = [f"{name} {counts.text()}" if several else counts.text() for name, counts in queries.items()]
        fractions = [counts.fraction for counts in queries.values() if counts.fraction is not None]
        share = None
        if not any(fractions):
            tasks, share = self._tasks()
            parts += [tasks] if tasks else []
        parts.append(f"{duration(time.monotonic() - self._started)} so far")
        return f"{self._label}: {'; '.join(parts)}", min(fractions, default=share)

    def _with_outputs(self, name: str, counts: QueryCounts) -> QueryCounts:
        """The counts with the rows of the running micro-batch; never fewer than before, until its event arrives."""
        live = counts.with_outputs(self._outputs.count())
        before = self._live.get(name, live)
        counts = live if live.rows >= before.rows else before
        if before.first_at is not None:
            counts = dataclasses.replace(counts, first_rows=before.first_rows, first_at=before.first_at)
        elif counts.rows:
            counts = dataclasses.replace(counts, first_rows=counts.rows, first_at=time.monotonic())
        self._live[name] = counts
        return counts

    def _tasks(self) -> tuple[str | None, float | None]:
        """The tasks of the active stages of Spark in words, and the share of them that has finished."""
        stages = [stage for stage in map(self._tracker.getStageInfo, self._tracker.getActiveStageIds()) if stage]
        if not stages:
            return None, None
        now = time.monotonic()
        self._stages_since = {stage.stageId: self._stages_since.get(stage.stageId, now) for stage in stages}
        done, total = sum(stage.numCompletedTasks for stage in stages), sum(stage.numTasks for stage in stages)
        text = f"{done:,} of {total:,} Spark tasks"
        seconds = now - min(self._stages_since.values())
        if left := time_left(done / max(total, 1), seconds):
            text += f", {left}"
        return text, done / max(total, 1)


class _PythonOutputs:
    """Counts the rows that Python workers have returned in the running SQL executions.

    Executors report the metrics of running tasks with each heartbeat (every 10 s); there is no Python API for them.
    """

    def __init__(self, spark: Any) -> None:
        self._spark, self._count, self._read_at = spark, 0, -math.inf

    def count(self) -> int:
        """Returns the rows; 0 if Spark does not tell them."""
        if time.monotonic() - self._read_at >= _OUTPUTS_SECONDS:
            self._read_at = time.monotonic()
            try:
                self._count = self._read()
            except Exception as error:  # internal interfaces of Spark, without which only this count is missing
                LOGGER.debug("the rows of Python workers cannot be read: %s", error)
        return self._count

    def _read(self) -> int:
        store = self._spark._jsparkSession.sharedState().statusStore()
        begin = max(0, store.executionsCount() - _LATEST_EXECUTIONS)
        executions = _items(store.executionsList(begin, _LATEST_EXECUTIONS))
        running = [each.executionId() for each in executions if not each.completionTime().isDefined()]
        return sum(self._rows_of(store, execution) for execution in running)

    def _rows_of(self, store: Any, execution: int) -> int:
        nodes = [node for node in _items(store.planGraph(execution).allNodes()) if node.name() == "MapInArrow"]
        metrics = [metric for node in nodes for metric in _items(node.metrics())]
        ids = [metric.accumulatorId() for metric in metrics if metric.name() == "number of output rows"]
        values = store.executionMetrics(execution) if ids else None
        shown = [values.get(id) for id in ids] if values is not None else []
        return sum(int(value.get().replace(",", "")) for value in shown if value.isDefined())


def _items(sequence: Any) -> list[Any]:
    """The items of a sequence of Scala."""
    return [sequence.apply(i) for i in range(sequence.size())]
