"""Scores slices with the scorers of this process: which row goes to which scorer and back, and what becomes of errors.

Input: a slice as Spark's rows; output: its scored rows and their `Tally`. `prepare` decodes and tokenizes, in a thread
that works ahead; `score` runs the models. A scorer that raises is asked again by halves until the texts that it raises
on are found: these are failures, and the rest is scored. Refuses numerics and processes. Executor side, in a scorer
process or in the Spark worker. Nothing is kept of a slice: a retry scores it again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.workers.scorer_wire import Gone
from miniplm_udf.workers.slices import Failed, rows_by_alias, scored_rows
from miniplm_udf.workers.tally import Tally
from miniplm_udf.workers.worker_scorers import Kept, ScorerLike, TokenizingScorer, WorkerScorers

LOGGER = logging.getLogger("miniplm.udf")

# Slices that are ready, or being made ready, while a model works: two would do; one more evens out their sizes.
SLICES_AHEAD = 3
# With so many texts in a row, of this task or of those before it, it is the model or the machine that is broken: they
# must not be rejected. Texts that break a tokenizer come singly, or as a handful of one file; a broken model of a job
# is found within its first slice, where the task fails as a whole and nothing of it is written.
MAX_ERRORS_IN_A_ROW = 32
# Said by no text: our own errors, the end of the process, and of the one that asked.
_NOT_OF_A_TEXT = (errors.MiniplmError, Gone, KeyboardInterrupt, SystemExit, GeneratorExit)

T = TypeVar("T")


def loses_device(error: BaseException) -> bool:
    """Whether an error is one of CUDA, after which nothing runs on the GPU in this process any more."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


@dataclasses.dataclass
class Texts:
    """What a scorer is given: lists with one entry a row, and by tokenizer hash what a scorer's `tokenize` returned."""

    texts: Sequence[str | None]
    segment_ends: Sequence[Sequence[int]]
    ends_document: Sequence[bool]
    tokenized: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def pick(self, rows: Sequence[int] | None) -> "Texts":
        """Some of the rows; None means all."""
        if rows is None:
            return self
        tokenized: dict[str, Sequence[Any]] = {name: _pick(values, rows) for name, values in self.tokenized.items()}
        return Texts(
            _pick(self.texts, rows), _pick(self.segment_ends, rows), _pick(self.ends_document, rows), tokenized
        )

    def tokenized_by(self, scorer: TokenizingScorer) -> Sequence[Any]:
        if scorer.tokenizer_hash not in self.tokenized:
            self.tokenized[scorer.tokenizer_hash] = scorer.tokenize(self.texts, self.segment_ends)
        return self.tokenized[scorer.tokenizer_hash]

    def scored_by(self, scorer: ScorerLike) -> Sequence[Any]:
        if isinstance(scorer, TokenizingScorer):
            return scorer.score_tokenized(self.tokenized_by(scorer), self.ends_document)
        return scorer.score(self.texts, self.segment_ends, self.ends_document)


def _pick(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[row] for row in rows]


@dataclasses.dataclass
class Slice:
    """Rows that are scored at once.

    Attributes:
        kept: the columns that come out again.
        wanted: the rows of each alias, or None for all.
    """

    kept: pa.RecordBatch
    texts: Texts
    wanted: dict[str, list[int] | None]


class Engine:
    """Scores slices, in one call.

    Args:
        scorers: of the call.
        kept: names of the columns that come out as they went in, the instance's id first.
    """

    def __init__(self, scorers: WorkerScorers, kept: Sequence[str]) -> None:
        self._scorers, self._kept = scorers, list(kept)

    def prepare(self, rows: pa.RecordBatch) -> Slice:
        """Decodes rows, and tokenizes them for the scorers that are made already. For the reading thread."""
        segment_ends = rows.column("segment_ends")
        in_many_segments = len(segment_ends.flatten()) > 0
        texts = Texts(
            texts=rows.column("text").to_pylist(),
            segment_ends=[ends or () for ends in segment_ends.to_pylist()] if in_many_segments else [()] * len(rows),
            ends_document=[bool(ends) for ends in rows.column("ends_document").to_pylist()],
        )
        found = Slice(rows.select(self._kept), texts, rows_by_alias(rows.column("model_ids")))
        for scorer in map(self._scorers.made, found.wanted):
            if isinstance(scorer, TokenizingScorer):
                _tokenize_ahead(texts, scorer)
        return found

    def score(self, rows: Slice) -> tuple[list[pa.RecordBatch], Tally]:
        """Scores a slice with the models that its rows name: of each model a batch, and the counts of them all.

        Raises:
            ScoringError: no factory for an alias; results that are not one a row; a scorer that raises on every row.
        """
        batches, counts = [], Tally()
        for alias, wanted in rows.wanted.items():
            scorer = self._scorers.get(alias)
            with self._scorers.meter(alias).working(scorer.scorer, counts):
                results = _results(rows.texts.pick(wanted), alias, scorer)
            kept = rows.kept if wanted is None else rows.kept.take(pa.array(wanted, pa.int64()))
            batch, tally = scored_rows(kept, alias, results)
            batches.append(batch)
            counts.add(tally)
        self._scorers.slice_done()
        return batches, counts


def _tokenize_ahead(texts: Texts, scorer: TokenizingScorer) -> None:
    try:
        texts.tokenized_by(scorer)
    except _NOT_OF_A_TEXT:
        raise
    except BaseException as error:  # a panic of the Rust library is one
        LOGGER.debug("tokenizing ahead: %r; tried again, and by halves, in its turn", error)


def _results(texts: Texts, alias: str, scorer: Kept) -> Sequence[Any]:
    """A result a text. Where the scorer raises, each half by itself."""
    n = len(texts.texts)
    try:
        results = texts.scored_by(scorer.scorer)
    except _NOT_OF_A_TEXT:
        raise
    except BaseException as error:  # a panic of the Rust library is one
        if loses_device(error):
            raise
        if n == 1:
            return [_failed(alias, scorer, error)]
    else:
        if len(results) != n:
            raise errors.ScoringError(f"{alias}: expected {n} results, found {len(results)}: a scorer lost rows")
        scorer.errors_in_a_row = 0
        return results
    # Outside the except block: its traceback would keep the failed pass's memory.
    halves = (range(n // 2), range(n // 2, n))
    return [result for half in halves for result in _results(texts.pick(half), alias, scorer)]


def _failed(alias: str, scorer: Kept, error: BaseException) -> Failed:
    scorer.errors_in_a_row += 1
    if scorer.errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
        raise errors.ScoringError(
            f"{alias}: {scorer.errors_in_a_row} texts in a row cannot be scored, the last for "
            f"{type(error).__name__}: {error}; that is not the texts: look at the model and its executor's log"
        ) from error
    LOGGER.warning("%s: a text is rejected, for the scorer raised", alias, exc_info=error)
    return Failed("scorer_error", f"{type(error).__name__}: {error}")
