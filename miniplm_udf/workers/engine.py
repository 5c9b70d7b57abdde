"""Runs the scorers of this process on slices: gives each row to its scorers, and turns errors into failures.

Input: a slice of Spark's rows; output: its scored rows and their `ScoreCounts`. `prepare` decodes and tokenizes in a
thread that works ahead; `score` runs the models. Where a scorer raises, it is called again with each half of the texts,
until the texts that it raises for are found: these become failures, and the others are scored. Does no numerics and
starts no processes. Executor side, in a scorer process or in the Spark worker. Keeps nothing of a slice, so a retry
scores it again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.scoring.results import Failure
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.scorer_wire import ConnectionClosed
from miniplm_udf.workers.slices import result_rows, rows_by_alias
from miniplm_udf.workers.worker_scorers import (
    KeptScorer,
    TextGenerator,
    TokenizingScorer,
    WorkerScorer,
    WorkerScorers,
)

LOGGER = logging.getLogger("miniplm.workers")

# Slices that are prepared while a model works. Two slices keep the model busy; a third absorbs differences in size.
SLICES_AHEAD = 3
# After this many failed texts in a row, in this task and those before it, the model or the machine is broken, and the
# texts must not be rejected. A text that breaks a tokenizer is rare. A model that is broken from the start fails its
# task within the first slice, so that nothing is written.
MAX_ERRORS_IN_A_ROW = 32
# Errors that no text causes: this project's own errors, the end of the process, and the loss of the worker that asked.
_NO_FAULT_OF_A_TEXT = (errors.MiniplmError, ConnectionClosed, KeyboardInterrupt, SystemExit, GeneratorExit)

T = TypeVar("T")


def loses_device(error: BaseException) -> bool:
    """Whether this is a CUDA error, after which nothing can run on the GPU in this process any more.

    Args:
        error: an error that a scorer raised.
    """
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


@dataclasses.dataclass
class Texts:
    """The input of a scorer: lists with one entry for each row.

    Attributes:
        texts: the instances' texts, None where a row has none.
        segment_ends: UTF-8 byte offsets where one document ends and the next begins.
        ends_document: whether the text ends at a document's end.
        ids: ids of the instances.
        tokenized: results of `TokenizingScorer.tokenize`, by tokenizer hash.
    """

    texts: Sequence[str | None]
    segment_ends: Sequence[Sequence[int]]
    ends_document: Sequence[bool]
    ids: Sequence[str]
    tokenized: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def pick(self, rows: Sequence[int] | None) -> "Texts":
        """The texts of some rows.

        Args:
            rows: numbers of the rows, from 0; None means all.
        """
        if rows is None:
            return self
        tokenized: dict[str, Sequence[Any]] = {name: _pick(values, rows) for name, values in self.tokenized.items()}
        return Texts(
            texts=_pick(self.texts, rows),
            segment_ends=_pick(self.segment_ends, rows),
            ends_document=_pick(self.ends_document, rows),
            ids=_pick(self.ids, rows),
            tokenized=tokenized,
        )

    def tokenized_by(self, scorer: TokenizingScorer | TextGenerator) -> Sequence[Any]:
        """Returns the tokenized texts, one entry per row; tokenizes only once per `tokenizer_hash`.

        Args:
            scorer: a scorer that tokenizes in a separate call.
        """
        if scorer.tokenizer_hash not in self.tokenized:
            self.tokenized[scorer.tokenizer_hash] = scorer.tokenize(self.texts, self.segment_ends)
        return self.tokenized[scorer.tokenizer_hash]

    def results_of(self, scorer: WorkerScorer) -> Sequence[Any]:
        """Returns one result per row: the texts are scored or continued.

        Args:
            scorer: the scorer; if it is no plain `ScorerLike`, the texts are tokenized in a separate call.
        """
        if isinstance(scorer, TextGenerator):
            return scorer.generate(self.tokenized_by(scorer), self.ends_document, self.ids)
        if isinstance(scorer, TokenizingScorer):
            return scorer.score_tokenized(self.tokenized_by(scorer), self.ends_document)
        return scorer.score(self.texts, self.segment_ends, self.ends_document)


def _pick(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[row] for row in rows]


@dataclasses.dataclass
class PreparedSlice:
    """Decoded rows that are scored in one call.

    Attributes:
        carried: the columns that come out unchanged, the instance's id first.
        texts: the input of the scorers.
        rows_of: the numbers of the rows that name each alias; None where all rows do.
    """

    carried: pa.RecordBatch
    texts: Texts
    rows_of: dict[str, list[int] | None]


class Engine:
    """Runs the scorers on the slices of one call.

    Args:
        scorers: the scorers of the call.
        carried: names of the columns that come out unchanged, the instance's id first.
        schema: columns of the results: SCORED_SCHEMA or GENERATED_SCHEMA.
    """

    def __init__(self, scorers: WorkerScorers, carried: Sequence[str], schema: pa.Schema) -> None:
        self._scorers, self._carried, self._schema = scorers, list(carried), schema

    def prepare(self, rows: pa.RecordBatch) -> PreparedSlice:
        """Returns decoded rows, tokenized for the scorers that exist already. Called by the reading thread.

        Args:
            rows: columns text (string), segment_ends (list of integers), ends_document (boolean), model_ids (list of
                strings), and the carried columns.
        """
        segment_ends = rows.column("segment_ends")
        in_many_segments = len(segment_ends.flatten()) > 0
        texts = Texts(
            texts=rows.column("text").to_pylist(),
            segment_ends=[ends or () for ends in segment_ends.to_pylist()] if in_many_segments else [()] * len(rows),
            ends_document=[bool(ends) for ends in rows.column("ends_document").to_pylist()],
            ids=rows.column("instance_id").to_pylist(),
        )
        prepared = PreparedSlice(rows.select(self._carried), texts, rows_by_alias(rows.column("model_ids")))
        for scorer in map(self._scorers.existing, prepared.rows_of):
            if isinstance(scorer, TokenizingScorer | TextGenerator):
                _tokenize_ahead(texts, scorer)
        return prepared

    def score(self, prepared: PreparedSlice) -> tuple[list[pa.RecordBatch], ScoreCounts]:
        """Scores a slice with the models that its rows name.

        Args:
            prepared: the slice, as `prepare` returns it.

        Returns:
            A batch for each model, in ascending order of the aliases, and the counts of all.

        Raises:
            ScoringError: an alias has no factory, a scorer returns another number of results than texts, or it raises
                for MAX_ERRORS_IN_A_ROW texts in a row.
        """
        batches, counts = [], ScoreCounts()
        for alias, rows in prepared.rows_of.items():
            scorer = self._scorers.get(alias)
            with self._scorers.meter(alias).working(scorer.scorer, counts):
                results = _results(prepared.texts.pick(rows), alias, scorer)
            carried = prepared.carried if rows is None else prepared.carried.take(pa.array(rows, pa.int64()))
            batch, batch_counts = result_rows(carried, alias, results, self._schema)
            batches.append(batch)
            counts.add(batch_counts)
        self._scorers.slice_done()
        return batches, counts


def _tokenize_ahead(texts: Texts, scorer: TokenizingScorer | TextGenerator) -> None:
    try:
        texts.tokenized_by(scorer)
    except _NO_FAULT_OF_A_TEXT:
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        LOGGER.debug("tokenizing ahead: %r; `score` tries it again, in halves", error)


def _results(texts: Texts, alias: str, scorer: KeptScorer) -> Sequence[Any]:
    """One result for each text. Where the scorer raises, scores each half by itself."""
    n = len(texts.texts)
    try:
        results = texts.results_of(scorer.scorer)
    except _NO_FAULT_OF_A_TEXT:
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        if loses_device(error):
            raise
        if n == 1:
            return [_failure(alias, scorer, error)]
    else:
        if len(results) != n:
            raise errors.ScoringError(f"{alias}: expected {n} results, found {len(results)}: a scorer lost rows")
        scorer.errors_in_a_row = 0
        return results
    # Outside the except block: its traceback would keep the memory of the failed pass.
    halves = (range(n // 2), range(n // 2, n))
    return [result for half in halves for result in _results(texts.pick(half), alias, scorer)]


def _failure(alias: str, scorer: KeptScorer, error: BaseException) -> Failure:
    scorer.errors_in_a_row += 1
    if scorer.errors_in_a_row >= MAX_ERRORS_IN_A_ROW:
        raise errors.ScoringError(
            f"{alias}: {scorer.errors_in_a_row} texts in a row cannot be scored, the last for "
            f"{type(error).__name__}: {error}; the texts are not the cause: check the model and its executor's log"
        ) from error
    LOGGER.warning("%s: a text is rejected, because the scorer raised an error", alias, exc_info=error)
    return Failure("scorer_error", f"{type(error).__name__}: {error}")
