"""Arrow functions for `DataFrame.mapInArrow`: describing models and scoring rows. Knows columns and where to score.

Scorers come from picklable factories. Models run in a scorer process of their own (`scorer_client`), which outlives the
Spark worker; what is not a model runs in the worker itself. Either way one thread reads and tokenizes ahead (`engine`).
Refuses numerics. Loads neither torch nor pyspark when imported.

`score_arrow`: SCORE_REQUEST_DDL (and columns to carry) -> SCORED_DDL (and those), one row an (instance, alias).
`describe_arrow`: DESCRIBE_REQUEST_DDL -> DESCRIBED_DDL, one row a model. A retried task scores its rows again: the same
numbers to about 1e-6, so only what a finished task returned may be written.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.config import ModelConfig
from miniplm_udf.progress import configure_logging
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.workers.ahead import Ahead
from miniplm_udf.workers.engine import SLICES_AHEAD, Engine
from miniplm_udf.workers.scorer_client import score_in_process
from miniplm_udf.workers.slices import SCORED_SCHEMA, full_slices, rows_by_alias
from miniplm_udf.workers.tally import Tally
from miniplm_udf.workers.worker_scorers import ScorerLike, WorkerScorers

__all__ = [
    "DESCRIBED_DDL",
    "DESCRIBED_SCHEMA",
    "DESCRIBE_REQUEST_DDL",
    "SCORED_DDL",
    "SCORED_SCHEMA",
    "SCORE_REQUEST_DDL",
    "ArrowFunction",
    "ScorerLike",
    "describe_arrow",
    "description_of",
    "model_config_json",
    "score_arrow",
]

LOGGER = logging.getLogger("miniplm.udf")

SCORE_REQUEST_DDL = (
    "instance_id string, text string, segment_ends array<int>, ends_document boolean, model_ids array<string>"
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


class TallySink(Protocol):
    """Takes a task's tally: Spark's accumulator of `tally.TallyParam`, or what a test has for it."""

    def add(self, term: Tally, /) -> None: ...


def score_arrow(
    factories: Mapping[str, Callable[[], ScorerLike]], carried: Sequence[str] = (), tally: TallySink | None = None
) -> ArrowFunction:
    """The function that scores rows, for `DataFrame.mapInArrow(score_arrow(factories), SCORED_DDL)`.

    Args:
        factories: by model alias, a picklable callable that makes the scorer. Those with a `key` attribute (a string
            that says what it makes) are called in a scorer process, which keeps what they made across tasks and
            survives the worker; where one has none, all are called in the worker, and such a one once a call.
        carried: further columns of the input, which come out behind those of SCORED_SCHEMA as they went in.
        tally: takes the counts when all rows are scored.

    Returns:
        A function from batches with the columns of SCORE_REQUEST_DDL to batches of SCORED_SCHEMA: one row for each
        instance and each of its `model_ids`. Reasons of a row without a score, beside those of the scorer: nan_score
        (not a finite number), scorer_error (the scorer raises on the text), scorer_crashed (the text ends the process).
        Aliases without a factory are a ScoringError.
    """
    made, kept = dict(factories), ["instance_id", *carried]
    score = score_in_process if all(hasattr(factory, "key") for factory in made.values()) else _score_here

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        configure_logging()
        counts = Tally()
        yield from score(made, kept, batches, counts)
        if tally is not None:
            tally.add(counts)

    return run


def _score_here(
    factories: Mapping[str, Callable[[], ScorerLike]], kept: Sequence[str], batches: Iterator[pa.RecordBatch],
    counts: Tally,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Scores in this process, the Spark worker: for scorers that cost next to nothing and cannot crash."""
    scorers = WorkerScorers(factories)
    engine = Engine(scorers, kept)
    first = next(batches, None)
    # Before the thread starts: from the first slice on it knows how much text a slice is, and who tokenizes.
    for alias in () if first is None else rows_by_alias(first.column("model_ids")):
        scorers.get(alias)
    rest = itertools.chain(() if first is None else (first,), batches)
    with Ahead(map(engine.prepare, full_slices(rest, scorers.slice_bytes)), SLICES_AHEAD) as slices:
        for rows in slices:
            scored, tally = engine.score(rows)
            counts.add(tally)
            yield from scored


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
