"""Progress of work on Spark: finished tasks, and the rows and tokens of streaming queries. Driver only.

    score: 1,200 of 5,000 rows, 120.3 rows/s, teacher 9,341 tokens/s, 32 s left; 3 of 8 tasks of stage 17; 10 s so far

Input: Spark's status tracker, and the counts that the runner of queries publishes. Output: a bar on a terminal, drawn
twice a second; elsewhere a log line after 1.5 seconds and then every ten. While one piece of work runs inside another,
only the inner one is shown. Owns no table; imports no Spark.
"""

import contextlib
import dataclasses
import logging
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
        seconds: time since the query began.
    """

    rows: int
    rows_per_second: float
    tokens_per_second: Mapping[str, float]
    behind: int | None
    total: int | None
    unit: str
    seconds: float

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
        if left := time_left(self.fraction or 0.0, self.seconds):
            parts.append(left)
        return ", ".join(parts)


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
    watcher = _Watcher(spark.sparkContext.statusTracker(), label, every_seconds)
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

    def __init__(self, tracker: Any, label: str, every_seconds: float) -> None:
        self.has_ended = threading.Event()
        self._tracker, self._label, self._every_seconds = tracker, label, every_seconds
        self._started = time.monotonic()
        self._stages_since: dict[int, float] = {}
        self._bar: tqdm[Any] | None = None

    def run(self) -> None:
        """Shows the work until it has ended."""
        try:
            if is_terminal():
                self._draw_bar()
            else:
                self._log_lines()
        except Exception as error:  # the JVM has ended: the work says why
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
        """The line about the work, and the share of it that is done, or None."""
        queries = dict(_queries)
        several = len(queries) > 1
        parts = [f"{name} {counts.text()}" if several else counts.text() for name, counts in queries.items()]
        fractions = [counts.fraction for counts in queries.values() if counts.fraction is not None]
        tasks, share = self._tasks(with_time_left=not any(fractions))
        parts += [tasks] if tasks else []
        parts.append(f"{duration(time.monotonic() - self._started)} so far")
        return f"{self._label}: {'; '.join(parts)}", min(fractions, default=share)

    def _tasks(self, with_time_left: bool) -> tuple[str | None, float | None]:
        """The tasks of the active stages of Spark in words, and the share of them that has finished."""
        stages = [stage for stage in map(self._tracker.getStageInfo, self._tracker.getActiveStageIds()) if stage]
        if not stages:
            return None, None
        now = time.monotonic()
        self._stages_since = {stage.stageId: self._stages_since.get(stage.stageId, now) for stage in stages}
        done, total = sum(stage.numCompletedTasks for stage in stages), sum(stage.numTasks for stage in stages)
        names = ", ".join(str(stage.stageId) for stage in stages)
        text = f"{done:,} of {total:,} tasks of stage{'s' if len(stages) > 1 else ''} {names}"
        seconds = now - min(self._stages_since.values())
        if with_time_left and (left := time_left(done / max(total, 1), seconds)):
            text += f", {left}"
        return text, done / max(total, 1)
