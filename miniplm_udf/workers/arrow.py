"""The function that runs models on rows on executors, for `DataFrame.mapInArrow`. Knows columns and processes.

Scorers come from picklable factories. Models run in a scorer process of their own (`scorer_client`), which outlives the
Spark worker; a scorer that is no model runs in the worker itself. In both cases one thread reads and tokenizes ahead
(`engine`). Does no numerics. Loads neither torch nor pyspark when imported.

Input: columns of SCORE_REQUEST_SCHEMA (`messages`), and columns to carry. Output: columns of SCORED_SCHEMA, or of
GENERATED_SCHEMA, and the carried columns, one row for each pair of instance and alias. A retried task scores its rows
again, with the same numbers to about 1e-6, so only the output of a finished task may be written.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from miniplm_udf.progress import configure_logging
from miniplm_udf.workers.engine import SLICES_AHEAD, Engine
from miniplm_udf.workers.messages import SCORED_SCHEMA
from miniplm_udf.workers.read_ahead import ReadAhead
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.scorer_client import score_in_process
from miniplm_udf.workers.slices import full_slices, rows_by_alias
from miniplm_udf.workers.worker_scorers import WorkerScorer, WorkerScorers

ArrowFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


class ScoreCountsSink(Protocol):
    """Takes the counts of a task: Spark's accumulator with `ScoreCountsParam`, or its replacement in a test."""

    def add(self, term: ScoreCounts, /) -> None:
        """Adds the counts of one task.

        Args:
            term: the counts.
        """


def score_arrow(
    factories: Mapping[str, Callable[[], WorkerScorer]], carried: Sequence[str] = (),
    sink: ScoreCountsSink | None = None, schema: pa.Schema = SCORED_SCHEMA,
) -> ArrowFunction:  # fmt: skip
    """Makes the function that scores rows, for `DataFrame.mapInArrow(score_arrow(factories), SCORED_DDL)`.

    Args:
        factories: picklable callables that make the scorers, by model alias. If all have an attribute `key` (a string
            that names what the factory makes), they are called in a scorer process, which keeps its scorers across
            tasks and outlives the worker. Otherwise they are called in the worker, and a factory without a key once for
            each call.
        carried: further columns of the input, which come out unchanged after the columns of `schema`.
        sink: gets the counts when all rows are scored.
        schema: SCORED_SCHEMA; GENERATED_SCHEMA if the factories make `TextGenerator`s.

    Returns:
        A function from batches of SCORE_REQUEST_SCHEMA to batches of `schema`: one row for each instance and each
        of its `model_ids`. Reasons of a row without a score, besides the scorer's own: nan_score (not a finite number),
        scorer_error (the scorer raises an error for the text), scorer_crashed (the text ends the process). An alias
        without a factory is a ScoringError.
    """
    factories, columns = dict(factories), ["instance_id", *carried]
    score = score_in_process if all(hasattr(factory, "key") for factory in factories.values()) else _score_here

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        configure_logging()
        counts = ScoreCounts()
        yield from score(factories, columns, batches, counts, schema)
        if sink is not None:
            sink.add(counts)

    return run


def _score_here(
    factories: Mapping[str, Callable[[], WorkerScorer]], carried: Sequence[str], batches: Iterator[pa.RecordBatch],
    counts: ScoreCounts, schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Scores in this process, the Spark worker: for scorers that cost next to nothing and cannot crash."""
    scorers = WorkerScorers(factories)
    engine = Engine(scorers, carried, schema)
    first = next(batches, None)
    # Made before the thread starts, which then knows how much text a slice holds and which scorers tokenize.
    for alias in () if first is None else rows_by_alias(first.column("model_ids")):
        scorers.get(alias)
    rest = itertools.chain(() if first is None else (first,), batches)
    with ReadAhead(map(engine.prepare, full_slices(rest, scorers.slice_bytes)), SLICES_AHEAD) as slices:
        for prepared in slices:
            scored, slice_counts = engine.score(prepared)
            counts.add(slice_counts)
            yield from scored
