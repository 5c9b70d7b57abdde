"""Fault points: named places of a run at which the driver stops, tells the harness, and waits to be killed or released.

The product knows nothing of them: `installed` wraps, for its duration, what every stage goes through: Spark's
`foreachBatch`, and the writers of `miniplm_udf.store.tables`. One micro-batch of a query passes, in this order:

    ingest   before the write of instances -> between it and that of rejects -> after: written, not yet committed
    score    before the write of scores -> between it and that of rejects -> after: written, not yet committed by the
             checkpoint -> committed: the next micro-batch has begun
    matrix   before the write of score_matrix -> after: not yet committed
    refine   before the new version -> between it and its row in corpora -> after   (no query: batch 0)

Driver only. Nothing is changed but time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from miniplm_udf import schemas
from miniplm_udf.store import tables
from tests.support.faults.experiment import CORPUS

POINTS = {
    "ingest": ("before", "between", "after"),
    "score": ("before", "between", "after", "committed"),
    "matrix": ("before", "after"),
    "refine": ("before", "between", "after"),
}
_QUERIES = {"ingest": "ingest", "score": "score", "score_matrix": "matrix"}
# Which point a write comes right after, by table; `rejects` are written by two stages.
_BEFORE_WRITE = {"instances": "before", "scores": "before", "score_matrix": "before", "rejects": "between"}


@dataclasses.dataclass(frozen=True)
class Point:
    """`batch` is the micro-batch that is stopped at, or the first one behind it that passes the point."""

    stage: str
    name: str
    batch: int = 0

    def __str__(self) -> str:
        return f"{self.stage} {self.name}"


class Stops:
    """Knows the point at which to stop next.

    Args:
        stop: called at that point; returns the one after it.
        started: called with the stage of each streaming query that starts.
    """

    def __init__(self, stop: Callable[[Point], Point | None], started: Callable[[str], None]) -> None:
        self.next: Point | None = None
        self.started = started
        self._stop = stop
        # The micro-batch that is being written; one at a time, for a stage's queries run one after the other.
        self._stage, self._batch = "", 0

    def passing(self, stage: str, name: str, batch: int) -> None:
        wanted = self.next
        if wanted is not None and (wanted.stage, wanted.name) == (stage, name) and batch >= wanted.batch:
            self.next = None
            self.next = self._stop(Point(stage, name, batch))

    def micro_batch(self, stage: str, function: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
        def stopping(batch: Any, batch_id: int) -> None:
            if batch_id > 0:
                self.passing(stage, "committed", batch_id - 1)
            self._stage, self._batch = stage, batch_id
            try:
                function(batch, batch_id)
            finally:
                self._stage = ""
            self.passing(stage, "after", batch_id)

        return stopping

    def before_write(self, table: schemas.Table) -> None:
        if self._stage:
            if table.name in _BEFORE_WRITE:
                self.passing(self._stage, _BEFORE_WRITE[table.name], self._batch)
        elif table.name == f"refined/{CORPUS}":
            self.passing("refine", "before", 0)
        elif table.name == "corpora":
            self.passing("refine", "between", 0)

    def after_write(self, table: schemas.Table) -> None:
        if table.name == "corpora":
            self.passing("refine", "after", 0)

    def writer(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any, **named: Any) -> Any:
            table = next(value for value in (*arguments, *named.values()) if isinstance(value, schemas.Table))
            self.before_write(table)
            found = write(*arguments, **named)
            self.after_write(table)
            return found

        return stopping


@contextlib.contextmanager
def installed(stops: Stops) -> Iterator[None]:
    """Puts the wrappers in place."""
    from pyspark.sql.streaming.readwriter import DataStreamWriter

    option, for_each_batch, start = DataStreamWriter.option, DataStreamWriter.foreachBatch, DataStreamWriter.start

    def keeping_option(writer: Any, key: str, value: Any) -> Any:
        if key == "checkpointLocation":
            writer.stage_of_test = _QUERIES[Path(str(value)).name.split("-")[0]]
        return option(writer, key, value)

    def stopping_for_each_batch(writer: Any, function: Callable[[Any, int], None]) -> Any:
        def named(batch: Any, batch_id: int) -> None:
            stops.micro_batch(writer.stage_of_test, function)(batch, batch_id)

        return for_each_batch(writer, named)

    def telling_start(writer: Any, *arguments: Any, **named: Any) -> Any:
        stops.started(writer.stage_of_test)
        return start(writer, *arguments, **named)

    with contextlib.ExitStack() as stack:
        patches = [
            mock.patch.object(DataStreamWriter, "option", keeping_option),
            mock.patch.object(DataStreamWriter, "foreachBatch", stopping_for_each_batch),
            mock.patch.object(DataStreamWriter, "start", telling_start),
            mock.patch.object(tables, "append", stops.writer(tables.append)),
            mock.patch.object(tables, "overwrite", stops.writer(tables.overwrite)),
        ]
        for patch in patches:
            stack.enter_context(patch)
        yield
