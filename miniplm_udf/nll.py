"""`nll_udf`: the score of a text as a column expression, for DataFrames and, registered by name, for SQL.

    spark.udf.register("nll", nll_udf("Qwen/Qwen1.5-1.8B"))
    SELECT source, avg(nll(text).nll_sum_nats / nll(text).n_bytes) FROM texts GROUP BY source

Input: a column of whole texts; output: a struct of nll_sum_nats, n_tokens and n_bytes, null where there is no score.
Owns the way between a column and the jobs' `udf.score_arrow`, which does the work: the same scorer, kept by
a process beside the Python worker, and equal numbers. Refuses reasons: the jobs' table `rejects` has them. The driver
needs no torch: the model is described on an executor, once. A retried task scores its rows again.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from miniplm_udf.config import ModelConfig, ScoreConfig
from miniplm_udf.errors import ConfigError, ScoringError
from miniplm_udf.scoring.description import ModelDescription, with_absolute_path
from miniplm_udf.udf import (
    DESCRIBE_REQUEST_DDL,
    DESCRIBED_DDL,
    ScorerLike,
    describe_arrow,
    description_of,
    model_config_json,
    score_arrow,
)
from miniplm_udf.workers.model_scorers import ModelScorerFactory

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

NLL_TYPE = pa.struct([("nll_sum_nats", pa.float64()), ("n_tokens", pa.int64()), ("n_bytes", pa.int64())])
NLL_DDL = "nll_sum_nats double, n_tokens bigint, n_bytes bigint"

# The model's name in messages, as an alias of a config would be.
_ALIAS = "nll"
_REQUEST_SCHEMA = pa.schema(
    [
        ("instance_id", pa.string()),
        ("text", pa.string()),
        ("segment_ends", pa.list_(pa.int32())),
        ("ends_document", pa.bool_()),
        ("model_ids", pa.list_(pa.string())),
    ]
)


def nll_udf(
    model: str,
    *,
    ends_document: bool = True,
    tokens_per_batch: int | None = None,
    **settings: Any,
) -> Any:
    """A vectorised Spark UDF (an iterator of Arrow arrays) that scores a column of texts with a causal LM.

    Needs a running Spark session: one task looks at the model where it will run, so that a wrong name or setting is an
    error here. Every executor then scores in the dtype that was settled there. Each concurrent task of an executor has
    a scorer process, which loads the model once and keeps it until the session stops, or half an hour without use:
    have no more concurrent tasks than models fit.

    Equal calls in one SELECT, or within one aggregate, run the model once a row. A filter on the score, and a sort of a
    whole table, are steps of their own and run it again: write the scores to a table first. (With
    `nll_udf(...).asNondeterministic()`, called once in a subquery, a filter around that runs nothing again.)

    Args:
        model: a folder, a hub name, a `.gguf` file, or `package:NAME/FILE` (`ModelConfig.path`).
        ends_document: each text is a whole document, so the model also predicts the separator behind it, which then
            counts as a token: the scores that `miniplm score` gives with `chunking: {mode: document}` to documents of
            one instance. False for texts that are cut off.
        tokens_per_batch: token budget of one forward pass; None takes what is best on the device.
        settings: any other field of `ModelConfig`: document_separator, context_tokens, dtype, ...

    Returns:
        A UDF: text -> struct<nll_sum_nats double, n_tokens bigint, n_bytes bigint>: the sum of -log p in nats over the
        scored tokens, their number, and the UTF-8 bytes of text that they cover. Null for a null or empty text, and for
        one that has no finite score, does not fit in memory, or breaks the tokenizer or the model.

    Raises:
        ConfigError: an unknown setting, a wrong value, a separator that has to be named.
        ModelLoadError: no such model, or one that cannot be scored.
    """
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    config = _model_config(model, settings)
    description = _describe(SparkSession.active(), config)
    # Two looks at a score in one query are two workers of one task, one behind the other: neither may wait for a GPU.
    run = ScoreConfig(tokens_per_batch=tokens_per_batch, workers_per_gpu=None)
    factory = ModelScorerFactory(config, description, run)
    return arrow_udf(nll_arrow(factory, ends_document), NLL_DDL, ArrowUDFType.SCALAR_ITER)


def _model_config(model: str, settings: dict[str, Any]) -> ModelConfig:
    known = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "path"]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"nll_udf: unknown setting {name}{f'; did you mean {near[0]!r}?' if near else ''} "
                f"(known here: ends_document, tokens_per_batch, {', '.join(known)})"
            )
    return with_absolute_path(ModelConfig(path=str(model), **settings))


def _describe(spark: "SparkSession", config: ModelConfig) -> ModelDescription:
    rows = spark.createDataFrame([(_ALIAS, model_config_json(config), None)], DESCRIBE_REQUEST_DDL).coalesce(1)
    (row,) = rows.mapInArrow(describe_arrow, DESCRIBED_DDL).collect()
    return description_of(row.asDict())


def nll_arrow(
    factory: Callable[[], ScorerLike], ends_document: bool
) -> Callable[[Iterator[pa.Array]], Iterator[pa.Array]]:
    """The function of the UDF: arrays of texts to arrays of NLL_TYPE, as many rows in all, in order.

    Args:
        factory: makes the scorer; one with a `key` is called in a scorer process, once (see `udf.score_arrow`).
        ends_document: of every text.
    """
    score = score_arrow({_ALIAS: factory})

    def run(arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
        n_rows = 0
        for batch in score(_requests(arrays, ends_document)):
            expected = pa.array(map(str, range(n_rows, n_rows + batch.num_rows)), pa.string())
            if not batch.column("instance_id").equals(expected):
                raise ScoringError(f"nll: expected the scores of rows from {n_rows} on in order, found others")
            n_rows += batch.num_rows
            yield _structs(batch)

    return run


def _requests(arrays: Iterator[pa.Array], ends_document: bool) -> Iterator[pa.RecordBatch]:
    """Requests to score, their ids the numbers of the rows."""
    n_rows = 0
    for texts in arrays:
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise ScoringError(f"nll: expected a column of strings, found one of {texts.type}; cast it")
        n = len(texts)
        columns = [
            pa.array(map(str, range(n_rows, n_rows + n)), pa.string()),
            texts.cast(pa.string()),
            pa.array([[]] * n, pa.list_(pa.int32())),
            pa.array([ends_document] * n, pa.bool_()),
            pa.array([[_ALIAS]] * n, pa.list_(pa.string())),
        ]
        n_rows += n
        yield pa.RecordBatch.from_arrays(columns, schema=_REQUEST_SCHEMA)


def _structs(scored: pa.RecordBatch) -> pa.Array:
    """A struct a row; null, not a struct of nulls, for a text without a finite score."""
    columns = [scored.column(field.name).cast(field.type) for field in NLL_TYPE]
    is_score = pc.fill_null(pc.is_finite(columns[0]), False)
    return pa.StructArray.from_arrays(columns, fields=list(NLL_TYPE), mask=pc.invert(is_score))
