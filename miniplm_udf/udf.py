"""Arrow functions for `DataFrame.mapInArrow`: describing models and scoring rows. Knows columns and scorers only.

Owns which row goes to which scorer and back, slices, and the reading ahead: one thread takes Spark's batches, decodes
and tokenizes them while the models run in the main thread. Refuses numerics: a scorer comes from a picklable factory.
Loads neither torch nor pyspark when imported.

`score_arrow`: SCORE_REQUEST_DDL (and columns to carry) -> SCORED_DDL (and those), one row an (instance, alias).
`describe_arrow`: DESCRIBE_REQUEST_DDL -> DESCRIBED_DDL, one row a model. A retried task scores its rows again: the same
numbers to about 1e-6, so only what a finished task returned may be written.
"""

import dataclasses
import itertools
import json
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.ahead import Ahead
from miniplm_udf.config import ModelConfig
from miniplm_udf.progress import configure_logging
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.tally import ModelCounts, Tally
from miniplm_udf.worker_scorers import ScorerLike, TokenizingScorer, WorkerScorers

LOGGER = logging.getLogger("miniplm.udf")

SCORE_REQUEST_DDL = (
    "instance_id string, text string, segment_ends array<int>, ends_document boolean, model_ids array<string>"
)
SCORED_SCHEMA = pa.schema(
    [
        ("instance_id", pa.string()),
        ("model_id", pa.string()),
        ("nll_sum_nats", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
SCORED_DDL = (
    "instance_id string, model_id string, nll_sum_nats double, n_tokens bigint, n_bytes bigint, "
    "reason string, detail string"
)
DESCRIBE_REQUEST_DDL = "alias string, config_json string, dtype string"
DESCRIBED_SCHEMA = pa.schema(
    [
        ("alias", pa.string()),
        ("description_json", pa.string()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
DESCRIBED_DDL = "alias string, description_json string, error_class string, error string"

ArrowFunction = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
# Slices that are ready, or being made ready, while a model works: two would do; one more evens out their sizes.
_SLICES_AHEAD = 3
_MAX_DETAIL = 1000
_NUMBER_NAMES = ("nll_sum_nats", "n_tokens", "n_bytes")
_NUMBERS = operator.attrgetter(*_NUMBER_NAMES)

T = TypeVar("T")


class TallySink(Protocol):
    """Takes a task's tally: Spark's accumulator of `tally.TallyParam`, or what a test has for it."""

    def add(self, term: Tally, /) -> None: ...


def score_arrow(
    factories: Mapping[str, Callable[[], ScorerLike]], carried: Sequence[str] = (), tally: TallySink | None = None
) -> ArrowFunction:
    """The function that scores rows, for `DataFrame.mapInArrow(score_arrow(factories), SCORED_DDL)`.

    Args:
        factories: by model alias, a picklable callable that makes the scorer. One with a `key` attribute (a string that
            says what it makes) is called once a worker process; one without, once a call.
        carried: further columns of the input, which come out behind those of SCORED_SCHEMA as they went in.
        tally: takes the counts when all rows are scored.

    Returns:
        A function from batches with the columns of SCORE_REQUEST_DDL to batches of SCORED_SCHEMA: one row for each
        instance and each of its `model_ids`. A score that is not a finite number has the reason nan_score. Aliases
        without a factory are a ScoringError.
    """
    made, kept = dict(factories), ["instance_id", *carried]

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        configure_logging()
        counts = Tally()
        scorers = WorkerScorers(made, counts)
        first = next(batches, None)
        # Before the thread starts: from the first slice on it knows how much text a slice is, and who tokenizes.
        for alias in () if first is None else _wanted(first.column("model_ids")):
            scorers.get(alias)
        rest = itertools.chain(() if first is None else (first,), batches)
        with Ahead(_prepared(rest, kept, scorers), _SLICES_AHEAD) as slices:
            for rows in slices:
                for alias in rows.wanted:
                    yield _score(rows, alias, scorers, counts)
                scorers.slice_done()
        if tally is not None:
            tally.add(counts)

    return run


@dataclasses.dataclass
class _Slice:
    """Rows that are scored at once. Lists have one entry a row.

    Attributes:
        kept: the columns that come out again.
        wanted: the rows of each alias, or None for all.
        tokenized: by tokenizer hash, what a scorer's `tokenize` returned.
    """

    kept: pa.RecordBatch
    texts: list[str | None]
    segment_ends: list[Sequence[int]]
    ends_document: list[bool]
    wanted: dict[str, list[int] | None]
    tokenized: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def tokenized_by(self, scorer: TokenizingScorer) -> Sequence[Any]:
        if scorer.tokenizer_hash not in self.tokenized:
            self.tokenized[scorer.tokenizer_hash] = scorer.tokenize(self.texts, self.segment_ends)
        return self.tokenized[scorer.tokenizer_hash]

    def results(self, alias: str, scorer: ScorerLike) -> Sequence[Any]:
        rows = self.wanted[alias]
        ends_document = _pick(self.ends_document, rows)
        if isinstance(scorer, TokenizingScorer):
            return scorer.score_tokenized(_pick(self.tokenized_by(scorer), rows), ends_document)
        return scorer.score(_pick(self.texts, rows), _pick(self.segment_ends, rows), ends_document)


def _pick(values: Sequence[T], rows: list[int] | None) -> Sequence[T]:
    return values if rows is None else [values[row] for row in rows]


def _prepared(batches: Iterator[pa.RecordBatch], kept: list[str], scorers: WorkerScorers) -> Iterator[_Slice]:
    """Slices, decoded, and tokenized for the scorers that are made already. Runs in the reading thread."""
    for rows in _full_slices(batches, scorers):
        one = _decoded(rows, kept)
        for scorer in map(scorers.made, one.wanted):
            if isinstance(scorer, TokenizingScorer):
                one.tokenized_by(scorer)
        yield one


def _full_slices(batches: Iterator[pa.RecordBatch], scorers: WorkerScorers) -> Iterator[pa.RecordBatch]:
    """Cuts and joins batches, so that each slice but the last has `slice_bytes` of text, or one row that reaches it."""
    import numpy as np
    import pyarrow.compute as pc

    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        lengths = pc.fill_null(pc.binary_length(batch.column("text")), 0).to_numpy(zero_copy_only=False)
        ends, start = np.cumsum(lengths, dtype=np.int64), 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            # The first row with which the slice is full.
            row = int(np.searchsorted(ends, before + scorers.slice_bytes() - size))
            if row == len(ends):
                held.append(batch.slice(start))
                size += int(ends[-1]) - before
                break
            yield _joined([*held, batch.slice(start, row + 1 - start)])
            held, size, start = [], 0, row + 1
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _decoded(rows: pa.RecordBatch, kept: list[str]) -> _Slice:
    segment_ends = rows.column("segment_ends")
    in_many_segments = len(segment_ends.flatten()) > 0
    return _Slice(
        kept=rows.select(kept),
        texts=rows.column("text").to_pylist(),
        segment_ends=[ends or () for ends in segment_ends.to_pylist()] if in_many_segments else [()] * len(rows),
        ends_document=[bool(ends) for ends in rows.column("ends_document").to_pylist()],
        wanted=_wanted(rows.column("model_ids")),
    )


def _wanted(model_ids: pa.ListArray) -> dict[str, list[int] | None]:
    import numpy as np
    import pyarrow.compute as pc

    aliases, rows = pc.list_flatten(model_ids), pc.list_parent_indices(model_ids)
    wanted: dict[str, list[int] | None] = {}
    for alias in sorted(aliases.unique().to_pylist()):
        of_alias = np.unique(rows.filter(pc.equal(aliases, alias)).to_numpy()).tolist()
        wanted[alias] = None if len(of_alias) == len(model_ids) else of_alias
    return wanted


def _score(rows: _Slice, alias: str, scorers: WorkerScorers, counts: Tally) -> pa.RecordBatch:
    scorer, meter = scorers.get(alias), scorers.meter(alias)
    wanted = rows.wanted[alias]
    kept = rows.kept if wanted is None else rows.kept.take(pa.array(wanted, pa.int64()))
    with meter.working(scorer):
        results = rows.results(alias, scorer)
    if len(results) != kept.num_rows:
        raise errors.ScoringError(
            f"{alias}: expected {kept.num_rows} results, found {len(results)}: a scorer lost rows"
        )
    return _scored(kept, alias, results, counts)


def _scored(kept: pa.RecordBatch, alias: str, results: Sequence[Any], counts: Tally) -> pa.RecordBatch:
    """The output rows, counted. A failure has no numbers, a score no reason."""
    import numpy as np
    import pyarrow.compute as pc

    numbers = _numbers(results)
    failed = np.flatnonzero(~np.isfinite(np.array(numbers[0], np.float64))).tolist()
    reasons: list[str | None] = [None] * len(results)
    details: list[str | None] = [None] * len(results)
    for row in failed:
        for values in numbers:
            values[row] = None
        reasons[row] = getattr(results[row], "reason", None) or "nan_score"
        details[row] = str(getattr(results[row], "detail", None) or "")[:_MAX_DETAIL] or None
    arrays = [
        pa.array(values, field.type)
        for values, field in zip([*numbers, reasons, details], list(SCORED_SCHEMA)[2:], strict=True)
    ]
    ids = kept.column(0).cast(pa.string())
    counts.add(
        Tally(
            models={alias: ModelCounts(len(results) - len(failed), len(failed), pc.sum(arrays[1]).as_py() or 0)},
            failed=[(ids[row].as_py(), alias, str(reasons[row]), details[row]) for row in failed],
        )
    )
    return pa.RecordBatch.from_arrays(
        [ids, pa.repeat(alias, len(results)), *arrays, *kept.columns[1:]],
        schema=pa.schema([*SCORED_SCHEMA, *list(kept.schema)[1:]]),
    )


def _numbers(results: Sequence[Any]) -> list[list[Any]]:
    """nll_sum_nats, n_tokens and n_bytes of the results, None for a failure."""
    rows: list[tuple[Any, ...]]
    try:
        # Without a failure among them, which is the usual: no look at each for what it may lack.
        rows = list(map(_NUMBERS, results))
    except AttributeError:
        rows = [tuple(getattr(result, name, None) for name in _NUMBER_NAMES) for result in results]
    return [list(column) for column in zip(*rows, strict=True)]


def describe_arrow(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Describes models where they will run, for `DataFrame.mapInArrow(describe_arrow, DESCRIBED_DDL)`.

    Args:
        batches: columns of DESCRIBE_REQUEST_DDL: alias, the JSON of its ModelConfig (`model_config_json`) and the dtype
            that is settled already, or null.

    Yields:
        The JSON of the ModelDescription, or an error's class and message: `description_of` makes either of a row.
    """
    configure_logging()
    for batch in batches:
        rows = [_described(**row) for row in batch.select(["alias", "config_json", "dtype"]).to_pylist()]
        yield pa.RecordBatch.from_pylist(rows, schema=DESCRIBED_SCHEMA)


def _described(alias: str, config_json: str, dtype: str | None) -> dict[str, str | None]:
    row: dict[str, str | None] = dict.fromkeys(DESCRIBED_SCHEMA.names)
    row["alias"] = alias
    try:
        from miniplm_udf.scoring.models import describe

        row["description_json"] = describe(alias, ModelConfig(**json.loads(config_json)), dtype).to_json()
    except errors.MiniplmError as error:
        row["error_class"], row["error"] = type(error).__name__, str(error)
    except Exception as error:  # as data to the driver, which raises
        LOGGER.exception("model %s cannot be described", alias)
        row["error_class"], row["error"] = "ModelLoadError", f"models.{alias}: {type(error).__name__}: {error}"
    return row


def model_config_json(config: ModelConfig) -> str:
    """The `config_json` of a request."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def description_of(row: Mapping[str, Any]) -> ModelDescription:
    """The description in a row of `describe_arrow` (a dict, or `Row.asDict()`), on the driver.

    Raises:
        MiniplmError: of the class and with the message that the executor met.
    """
    if row["error_class"] is not None:
        raise getattr(errors, row["error_class"])(row["error"])
    return ModelDescription.from_json(row["description_json"])
