"""Arrow functions for `DataFrame.mapInArrow`: describing models and scoring rows. Knows columns and GPUs only.

Owns which row goes to which scorer and back, the scorers that a Python worker keeps, and the GPU that Spark assigned.
Refuses numerics: a scorer comes from a picklable factory. Loads neither torch nor pyspark when imported; both are
imported inside the functions, on the executor.

`score_arrow`: SCORE_REQUEST_DDL -> SCORED_DDL, one row an (instance, alias). `describe_arrow`: DESCRIBE_REQUEST_DDL ->
DESCRIBED_DDL, one row a model. A retried task scores its rows again: the same numbers to about 1e-6, so only what a
finished task returned may be written.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from miniplm_udf import errors
from miniplm_udf.config import ModelConfig
from miniplm_udf.progress import configure_logging
from miniplm_udf.scoring.description import ModelDescription

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
        # The row's share of the time that the scorer took for its slice: rates are summed up from it, loading aside.
        ("seconds", pa.float64()),
    ]
)
SCORED_DDL = (
    "instance_id string, model_id string, nll_sum_nats double, n_tokens bigint, n_bytes bigint, "
    "reason string, detail string, seconds double"
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
# Text handed to a scorer at once, where the scorer has no `slice_bytes` of its own.
_SLICE_BYTES = 1024 * 1024
_LOG_EVERY_SECONDS = 10.0
# Scorers of this worker process, by their factory's key: a model is loaded once, and kept across tasks.
_SCORERS: dict[str, "ScorerLike"] = {}


class ScorerLike(Protocol):
    """What scores texts: `scoring.scorer.Scorer`, or a fake in a test.

    May have `slice_bytes` (text that is worth handing over at once) and `on_progress` (set by us, called with counts of
    scored tokens). A result has nll_sum_nats, n_tokens and n_bytes, or reason and detail.
    """

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> Sequence[Any]: ...


def score_arrow(factories: Mapping[str, Callable[[], ScorerLike]]) -> ArrowFunction:
    """The function that scores rows, for `DataFrame.mapInArrow(score_arrow(factories), SCORED_DDL)`.

    Args:
        factories: by model alias, a picklable callable that makes the scorer. One with a `key` attribute (a string that
            says what it makes) is called once a worker process; one without, once a call.

    Returns:
        A function from batches with the columns of SCORE_REQUEST_DDL to batches of SCORED_SCHEMA: one row for each
        instance and each of its `model_ids`. Aliases without a factory are a ScoringError.
    """
    made = dict(factories)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        configure_logging()
        scorers = _Scorers(made)
        for batch in batches:
            yield from _score_batch(batch, scorers)

    return run


class _Scorers:
    """The scorers of one call, made at their first use, with a meter each."""

    def __init__(self, factories: Mapping[str, Callable[[], ScorerLike]]) -> None:
        self._factories = factories
        self._own: dict[str, ScorerLike] = {}
        self._meters: dict[str, _Meter] = {}

    def get(self, alias: str) -> ScorerLike:
        if alias not in self._factories:
            raise errors.ScoringError(
                f"model_ids: expected aliases of {sorted(self._factories)}, found {alias!r}; "
                f"give score_arrow its factory"
            )
        key = getattr(self._factories[alias], "key", None)
        kept, name = (self._own, alias) if key is None else (_SCORERS, str(key))
        if name not in kept:
            self._make_room()
            kept[name] = self._factories[alias]()
        return kept[name]

    def meter(self, alias: str) -> "_Meter":
        return self._meters.setdefault(alias, _Meter(alias))

    def _make_room(self) -> None:
        """Lets go of models that this call has no use for."""
        wanted = {getattr(factory, "key", None) for factory in self._factories.values()}
        for key in [key for key in _SCORERS if key not in wanted]:
            del _SCORERS[key]


class _Meter:
    """Logs a model's texts and tokens per second of its own work, every ten seconds."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._texts = self._tokens = 0
        self._busy_seconds = 0.0
        self._since = self._logged = time.monotonic()

    def resume(self) -> None:
        self._since = time.monotonic()

    def pause(self, texts: int) -> None:
        self._texts += texts
        self._busy_seconds += time.monotonic() - self._since

    def add(self, tokens: int) -> None:
        """Counts tokens, between `resume` and `pause`."""
        self._tokens += tokens
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_SECONDS:
            self._logged = now
            rate = self._tokens / max(self._busy_seconds + now - self._since, 1e-9)
            LOGGER.info("%s: %d texts, %d tokens, %.0f tokens/s", self._alias, self._texts, self._tokens, rate)


def _score_batch(batch: pa.RecordBatch, scorers: _Scorers) -> Iterator[pa.RecordBatch]:
    model_ids = [aliases or [] for aliases in batch.column("model_ids").to_pylist()]
    for alias in sorted({alias for aliases in model_ids for alias in aliases}):
        scorer = scorers.get(alias)
        wanted = [row for row, aliases in enumerate(model_ids) if alias in aliases]
        rows = batch if len(wanted) == batch.num_rows else batch.take(pa.array(wanted, pa.int64()))
        for start, length in _slices(rows, int(getattr(scorer, "slice_bytes", _SLICE_BYTES))):
            yield _score_rows(rows.slice(start, length), alias, scorer, scorers.meter(alias))


def _slices(rows: pa.RecordBatch, slice_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of runs of rows with about `slice_bytes` of text, so that results flow."""
    import pyarrow.compute as pc

    start, size = 0, 0
    lengths = pc.binary_length(rows.column("text")).to_pylist()
    for row, n_bytes in enumerate(lengths):
        size += n_bytes or 0
        if size >= slice_bytes or row == len(lengths) - 1:
            yield start, row + 1 - start
            start, size = row + 1, 0


def _score_rows(rows: pa.RecordBatch, alias: str, scorer: ScorerLike, meter: _Meter) -> pa.RecordBatch:
    meter.resume()
    counts_itself = hasattr(scorer, "on_progress")
    if counts_itself:
        scorer.on_progress = meter.add  # type: ignore[attr-defined]
    start = time.monotonic()
    results = scorer.score(
        rows.column("text").to_pylist(),
        [ends or [] for ends in rows.column("segment_ends").to_pylist()],
        [bool(ends) for ends in rows.column("ends_document").to_pylist()],
    )
    if len(results) != rows.num_rows:
        raise errors.ScoringError(
            f"{alias}: expected {rows.num_rows} results, found {len(results)}: a scorer lost rows"
        )
    if not counts_itself:
        meter.add(sum(getattr(result, "n_tokens", 0) for result in results))
    seconds = (time.monotonic() - start) / max(rows.num_rows, 1)
    meter.pause(rows.num_rows)
    columns = {"instance_id": rows.column("instance_id"), "model_id": pa.array([alias] * len(results), pa.string())}
    columns["seconds"] = pa.array([seconds] * len(results), pa.float64())
    for field in list(SCORED_SCHEMA)[2:-1]:
        # A failure has no numbers, a score no reason.
        columns[field.name] = pa.array([getattr(result, field.name, None) for result in results], field.type)
    return pa.RecordBatch.from_arrays(
        [columns[name].cast(SCORED_SCHEMA.field(name).type) for name in SCORED_SCHEMA.names], schema=SCORED_SCHEMA
    )


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
