"""Scores the rows of a Spark worker in a scorer process, and loses no row when the process dies.

Input: Spark's batches; output: batches of results. When the process dies (`scorer_connection`), another one gets
one slice at a time; a slice that kills it again is sent in halves, down to the row that kills it: this row is the
failure scorer_crashed, all others are scored. Holds a bounded number of slices. Owns no models. Executor side; a
retried task takes the slot again and finds the process that the first attempt left.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.scoring.results import Failure
from miniplm_udf.workers.engine import SLICES_AHEAD
from miniplm_udf.workers.process_slots import ScorerSlot, take_scorer_slot
from miniplm_udf.workers.read_ahead import ReadAhead
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.scorer_connection import Factories, ProcessConnection, ProcessDied, task_request
from miniplm_udf.workers.scorer_wire import TaskRequest
from miniplm_udf.workers.slices import full_slices, result_rows, rows_by_alias

LOGGER = logging.getLogger("miniplm.workers")

# Most slices without an answer. The process can receive as many while its main thread waits for the worker to read, so
# that the two never wait for each other.
_SLICES_SENT = SLICES_AHEAD + 1
_SLICES_READ = 2
# After this many deaths of a slot's process without an answer, in this and earlier tasks, the machine is the
# cause. Halving causes fewer: mostly one of two halves is harmless and is answered. A slice with four fatal texts, far
# apart, takes eight.
MAX_DEATHS = 12
# The kernel's out-of-memory killer can hit a model that would fit a moment later; if it does so twice, the model
# is too large.
_MAX_DEATHS_WHILE_LOADING = 2
# How often to check for input and for an answer while neither is ready.
_CHECK_EVERY_SECONDS = 0.01


def score_in_process(
    factories: Factories, carried: Sequence[str], batches: Iterator[pa.RecordBatch], counts: ScoreCounts,
    schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Scores with the models of a scorer process.

    Args:
        factories: callables with a `key` that make the scorers, by alias.
        carried: names of the columns that come out unchanged, the instance's id first.
        batches: rows with the columns of SCORE_REQUEST_SCHEMA and the carried columns.
        counts: gets the counts of each slice added.
        schema: columns of the results: SCORED_SCHEMA or GENERATED_SCHEMA.

    Yields:
        Batches of `schema` and the carried columns, one for each slice and model.

    Raises:
        ModelLoadError: a model cannot be loaded, or the process dies while it loads.
        ScoringError: the process dies whatever it is sent.
        MiniplmError: the error that the process raised, of the same class and with the same message.
    """
    first = next(batches, None)
    if first is None:
        return
    with contextlib.ExitStack() as stack:
        slot = stack.enter_context(contextlib.closing(take_scorer_slot([_key(make) for make in factories.values()])))
        request = task_request(slot, factories, carried, rows_by_alias(first.column("model_ids")), schema)
        process = stack.enter_context(contextlib.closing(ProcessConnection(slot, request)))
        task = _Task(slot, process, request, counts)
        task.open()
        rows = full_slices(itertools.chain((first,), batches), lambda: process.slice_bytes)
        slices = stack.enter_context(ReadAhead(rows, _SLICES_READ))
        yield from task.run(slices)


def _key(factory: Any) -> str:
    return str(factory.key)


@dataclasses.dataclass(frozen=True)
class _RowRange:
    """A range of a slice's rows, and how often the process died while it scored this range alone."""

    start: int
    rows: int
    deaths: int = 0

    def halves(self) -> "list[_RowRange]":
        half = self.rows // 2
        halves = [(self.start, half), (self.start + half, self.rows - half)]
        return [_RowRange(start, rows, self.deaths + 1) for start, rows in halves if rows]


class _Task:
    """Scores the slices of one task, even when the process dies."""

    def __init__(self, slot: ScorerSlot, process: ProcessConnection, request: TaskRequest, counts: ScoreCounts) -> None:
        self._slot, self._process, self._request, self._counts = slot, process, request, counts
        self._deaths_while_loading = 0

    def open(self) -> None:
        """Starts the process or finds it running, and connects; if it dies before it is ready, starts it again.

        Raises:
            ModelLoadError: it died twice while it loaded the models.
            ScoringError: it has died too often while it scored.
        """
        while not self._process.is_open:
            try:
                self._process.open()
            except ProcessDied as death:
                self._note(death)

    def run(self, slices: ReadAhead[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Scores slices in their order; several are sent before the first is answered."""
        sent: deque[pa.RecordBatch] = deque()
        more = True
        while more or sent:
            while more and len(sent) < _SLICES_SENT:
                # Waits for input only while there is no answer to read.
                if sent and not slices.ready:
                    if self._process.has_answer(_CHECK_EVERY_SECONDS):
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
        """The next answer; None if the process died before it answered."""
        try:
            return self._receive_answer()
        except ProcessDied as death:
            self._note(death)
            return None

    def _receive_answer(self) -> list[pa.RecordBatch]:
        """The next answer, counted; it resets the numbers of deaths."""
        batches, counts = self._process.answer()
        self._counts.add(counts)
        self._deaths_while_loading = 0
        if self._slot.deaths:
            self._slot.deaths = 0
        return batches

    def _alone(self, rows: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Scores a slice while no other is sent; in halves when the process dies.

        A row is rejected when the process died while it scored this row alone, and had died before in a part with it.
        """
        done: dict[int, list[pa.RecordBatch]] = {}
        # Large parts first: an answer shows that many rows are harmless.
        todo = deque([_RowRange(0, rows.num_rows)])
        while todo:
            part = todo.popleft()
            part_rows = rows.slice(part.start, part.rows)
            try:
                self.open()
                self._process.send(part_rows)
                done[part.start] = self._receive_answer()
            except ProcessDied as death:
                self._note(death)
                if death.while_loading is not None:
                    todo.appendleft(part)
                elif part.rows == 1 and part.deaths:
                    done[part.start] = self._rejected(part_rows, death)
                else:
                    todo.extend(part.halves())
        return [batch for start in sorted(done) for batch in done[start]]

    def _note(self, death: ProcessDied) -> None:
        """Counts a death of the process.

        Raises:
            ModelLoadError: it has died too often while it loaded.
            ScoringError: it has died too often while it scored.
        """
        LOGGER.warning("the scorer process died during %s: %s", death.while_loading or "scoring", death.how)
        if death.while_loading is not None:
            self._deaths_while_loading += 1
            if self._deaths_while_loading >= _MAX_DEATHS_WHILE_LOADING:
                raise errors.ModelLoadError(
                    f"the scorer process died during {death.while_loading}, {self._deaths_while_loading} times: "
                    f"{death.how}; check the executor's log, and whether its memory is enough for the model"
                )
            return
        self._slot.deaths += 1
        if self._slot.deaths >= MAX_DEATHS:
            raise errors.ScoringError(
                f"the scorer process died {self._slot.deaths} times and scored nothing between, the last time "
                f"{death.how}; the texts are not the cause: check the executor's log and memory"
            )

    def _rejected(self, row: pa.RecordBatch, death: ProcessDied) -> list[pa.RecordBatch]:
        """The output of a row that ends the process: a failure for each of its models."""
        carried, batches = row.select(self._request.carried), []
        for alias in rows_by_alias(row.column("model_ids")):
            failure = Failure("scorer_crashed", f"the scorer process died while it scored this text: {death.how}")
            batch, counts = result_rows(carried, alias, [failure], self._request.schema)
            self._counts.add(counts)
            batches.append(batch)
        LOGGER.warning("%s is rejected: %s", carried.column(0)[0], death.how)
        return batches
