"""`nll_udf`: the score of a text as a column expression, for DataFrames and, registered by name, for SQL.

    spark.udf.register("nll", nll_udf("Qwen/Qwen1.5-1.8B"))
    SELECT source, avg(nll(text).nll_sum_nats / nll(text).n_bytes) FROM texts GROUP BY source

Input: a column of whole texts; output: a struct of nll_sum_nats, n_tokens and n_bytes, null for a text without a score.
Owns the conversion between a column and `workers.arrow.score_arrow`, which does the work as in the jobs: the same
scorer in the same process, and equal numbers. Gives no reasons for a missing score; the table `rejects` of the jobs
does. The driver needs no torch: an executor describes the model, once. A retried task scores its rows again.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from miniplm_udf.config.sections import ModelConfig, ScoreConfig, ServerConfig
from miniplm_udf.errors import ConfigError, ScoringError
from miniplm_udf.scores.models import describe_on_executor
from miniplm_udf.scoring.description import ModelDescription, with_absolute_path
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.messages import SCORE_REQUEST_SCHEMA, ddl
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from miniplm_udf.workers.worker_scorers import ScorerLike

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.nll")

NLL_TYPE = pa.struct([("nll_sum_nats", pa.float64()), ("n_tokens", pa.int64()), ("n_bytes", pa.int64())])
NLL_DDL = ddl(NLL_TYPE)

# The model's name in messages, as an alias of a config would be.
_ALIAS = "nll"


def nll_udf(
    model: str,
    *,
    ends_document: bool = True,
    tokens_per_batch: int | None = None,
    **settings: Any,
) -> Any:
    """Makes a vectorised Spark UDF (an iterator of Arrow arrays) that scores a column of texts with a causal LM.

    Needs a running Spark session: one task describes the model on an executor, so that a wrong name or setting is an
    error here, and settles the dtype that every executor scores in. Each concurrent task of an executor has a scorer
    process, which loads the model once and keeps it until the session stops or half an hour passes without use. Allow
    no more concurrent tasks than there is memory for models.

    Equal calls in one SELECT, or in one aggregate, run the model once for each row. A filter on the score and a sort of
    a whole table are separate steps and run it again: write the scores to a table first. (With
    `nll_udf(...).asNondeterministic()`, called once in a subquery, a filter around the subquery does not run it again.)

    Args:
        model: a folder, a hub name, a `.gguf` file, or `package:NAME/FILE` (`ModelConfig.path`).
        ends_document: True if each text is a whole document. The model then also predicts the separator after it,
            which counts as a token; `miniplm score` with `chunking: {mode: document}` gives the same scores to
            documents of one instance. False for texts that are cut off.
        tokens_per_batch: token budget of one forward pass; None searches the best one when a GPU loads the model, and
            takes 1,024 on a CPU.
        settings: other fields of `ModelConfig`: document_separator, context_tokens, dtype, ...; `server` may be a dict.

    Returns:
        A UDF: text -> struct<nll_sum_nats double, n_tokens bigint, n_bytes bigint>: the sum of -log p in nats over the
        scored tokens, their number, and the UTF-8 bytes of text that they cover. Null for a null or empty text, and for
        a text without a finite score, too long for the memory, or on which the tokenizer or the model fails.

    Raises:
        ConfigError: a setting is unknown or has a wrong value, or the separator has to be named.
        ModelLoadError: there is no such model, or it cannot be used to score.
    """
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    config = _model_config(model, settings)
    description = _describe(SparkSession.active(), config)
    # Two expressions of one query run in two workers of one task, one feeding the other: neither may wait for a GPU.
    run = ScoreConfig(tokens_per_batch=tokens_per_batch, workers_per_gpu=None)
    factory = ModelScorerFactory(config, description, run)
    return arrow_udf(nll_arrow(factory, ends_document), NLL_DDL, ArrowUDFType.SCALAR_ITER)


def _model_config(model: str, settings: Mapping[str, Any]) -> ModelConfig:
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "path"]
    for name in settings:
        if name not in names:
            similar = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"nll_udf: unknown setting {name}{f'; did you mean {similar[0]!r}?' if similar else ''} "
                f"(settings: ends_document, tokens_per_batch, {', '.join(names)})"
            )
    served = settings.get("server")
    if isinstance(served, Mapping):
        try:
            settings = {**settings, "server": ServerConfig(**served)}
        except TypeError as error:
            raise ConfigError(f"nll_udf: server: expected the keys of ServerConfig: {error}") from error
    return with_absolute_path(ModelConfig(path=str(model), **settings))


def _describe(spark: "SparkSession", config: ModelConfig) -> ModelDescription:
    description = describe_on_executor(spark, {_ALIAS: config}, {_ALIAS: None})[_ALIAS]
    LOGGER.info("%s: prefix: %s", description.path, description.prefix)
    for warning in description.warnings:
        LOGGER.warning("%s", warning)
    return description


def nll_arrow(
    factory: Callable[[], ScorerLike], ends_document: bool
) -> Callable[[Iterator[pa.Array]], Iterator[pa.Array]]:
    """Makes the function of the UDF, from arrays of texts to arrays of NLL_TYPE.

    Args:
        factory: makes the scorer; a factory with a `key` is called in a scorer process, once (see `score_arrow`).
        ends_document: whether every text ends at a document's end.

    Returns:
        A function that returns one row for each row that it receives, in the same order. It raises a ScoringError if
        an array does not hold strings.
    """
    score = score_arrow({_ALIAS: factory})

    def run(arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
        n_rows = 0
        for batch in score(_requests(arrays, ends_document)):
            expected = pa.array(map(str, range(n_rows, n_rows + batch.num_rows)), pa.string())
            if not batch.column("instance_id").equals(expected):
                raise ScoringError(f"nll: expected the scores of rows from {n_rows} on in order, found other rows")
            n_rows += batch.num_rows
            yield _structs(batch)

    return run


def _requests(arrays: Iterator[pa.Array], ends_document: bool) -> Iterator[pa.RecordBatch]:
    """Requests to score, with the numbers of the rows as ids."""
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
        yield pa.RecordBatch.from_arrays(columns, schema=SCORE_REQUEST_SCHEMA)


def _structs(scored: pa.RecordBatch) -> pa.Array:
    """One struct for each row; null, not a struct of nulls, for a text without a finite score."""
    columns = [scored.column(field.name).cast(field.type) for field in NLL_TYPE]
    is_score = pc.fill_null(pc.is_finite(columns[0]), False)
    return pa.StructArray.from_arrays(columns, fields=list(NLL_TYPE), mask=pc.invert(is_score))
