"""`score_matrix`: the wide form of `scores`, kept by a streaming query of its own over the committed rows. Driver only.

    scores (long, one row an (instance, model)) -> one row an instance, five columns a model alias, beside its place

An instance appears once all configured revisions have scored it, and once only. The query's checkpoint belongs to one
ordered set of (alias, revision); its micro-batch 0 replaces the table, later ones append, each in one commit under
(query_id, batch_id), so a replay writes nothing twice. `scores` can rebuild the table at any time: where the table is
not the work of this checkpoint, the checkpoint is dropped and the query starts anew.

    bits_per_byte = nll_sum_nats / (ln 2 * n_bytes), null unless every byte of the text was scored
"""

import logging
import math
from typing import TYPE_CHECKING

import fsspec

from miniplm_udf import schemas, storage, tables
from miniplm_udf.config import ScoreConfig, fingerprint
from miniplm_udf.errors import MiniplmError
from miniplm_udf.streaming import RunningQuery, checkpoint_query_id, start_query

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.matrix")

_INSTANCE_COLUMNS = ("instance_id", "source", "n_bytes", "split", "content_hash")


def checkpoint_name(revisions: dict[str, str]) -> str:
    """The name of the query that keeps the matrix of these models.

    Args:
        revisions: model revisions by alias, in the order of the columns.
    """
    return "score_matrix-" + fingerprint(list(revisions.items()))


def start_matrix(
    spark: "SparkSession", revisions: dict[str, str], tables_uri: str, checkpoint_uri: str, config: ScoreConfig
) -> RunningQuery:
    """Starts the query that brings `score_matrix` up to date with `scores`.

    Args:
        revisions: model revisions by alias, in the order of the columns.
        tables_uri: where `instances`, `scores` and `score_matrix` are.
        checkpoint_uri: of this query (`checkpoint_name`).
    """
    tables.create(spark, storage.join(tables_uri, "scores"), schemas.SCORES)
    if not _is_own_work(spark, revisions, tables_uri, checkpoint_uri):
        LOGGER.info("score_matrix: built anew for %s", ", ".join(revisions))
        _remove(checkpoint_uri)

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        write_batch(batch, revisions, tables_uri, query_id, batch_id)

    stream = (
        spark.readStream.format("delta")
        .option("maxBytesPerTrigger", config.max_bytes_per_trigger)
        .load(storage.join(tables_uri, "scores"))
    )
    return start_query(stream, micro_batch, checkpoint_uri, config)


def _is_own_work(spark: "SparkSession", revisions: dict[str, str], tables_uri: str, checkpoint_uri: str) -> bool:
    """Whether the table's rows are this checkpoint's. All rows of the table are of one query."""
    try:
        query_id = checkpoint_query_id(spark, checkpoint_uri)
    except MiniplmError:
        return False
    uri = storage.join(tables_uri, "score_matrix")
    if not tables.exists(spark, uri):
        return False
    found = spark.read.format("delta").load(uri)
    if found.columns != schemas.score_matrix(list(revisions)).column_names:
        return False
    return [row[0] for row in found.select("query_id").limit(1).collect()] == [query_id]


def _remove(uri: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def write_batch(batch: "DataFrame", revisions: dict[str, str], tables_uri: str, query_id: str, batch_id: int) -> None:
    """Writes the instances that this micro-batch of `scores` rows completes.

    Args:
        batch: rows of `scores`, of any model.
    """
    from pyspark.sql import functions as F

    spark = batch.sparkSession
    uri, table = storage.join(tables_uri, "score_matrix"), schemas.score_matrix(list(revisions))
    wide = pivot(batch, revisions).persist()
    try:
        complete = wide.where(_is_complete(revisions))
        partial = wide.where(f"not ({_is_complete(revisions)})").select("instance_id")
        if not partial.isEmpty():
            # Their other rows came in another commit: earlier ones are in the table now, later ones will find these.
            scores = spark.read.format("delta").load(storage.join(tables_uri, "scores"))
            rest = pivot(scores.join(partial, "instance_id", "left_semi"), revisions).where(_is_complete(revisions))
            if batch_id > 0:
                rest = tables.missing_from(rest, spark.read.format("delta").load(uri))
            complete = complete.unionByName(rest)
        instances = tables.read(spark, storage.join(tables_uri, "instances")).select(*_INSTANCE_COLUMNS)
        rows = (
            _with_ratios(complete.join(instances, "instance_id"), revisions)
            .select(
                *(name for name in table.column_names if name not in ("query_id", "batch_id")),
                F.lit(query_id).alias("query_id"),
                F.lit(batch_id).cast("bigint").alias("batch_id"),
            )
            .persist()
        )
        n_rows = rows.count()
        if batch_id == 0:
            tables.overwrite(rows, uri, table, query_id=query_id, batch_id=batch_id)
        elif n_rows:
            tables.append(rows, uri, table, query_id, batch_id)
        rows.unpersist()
        LOGGER.info("score_matrix: micro-batch %d: %d rows", batch_id, n_rows)
    finally:
        wide.unpersist()


def pivot(scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    """Rows of `scores`, one an instance: `<alias>_nll_sum_nats`, `_n_tokens`, `_n_bytes`; null where not scored."""
    from pyspark.sql import functions as F

    columns = [
        F.max(F.when(F.col("model_revision") == revision, F.col(name))).alias(f"{alias}_{name}")
        for alias, revision in revisions.items()
        for name in ("nll_sum_nats", "n_tokens", "n_bytes")
    ]
    wanted = scores.where(F.col("model_revision").isin(sorted(set(revisions.values()))))
    return wanted.groupBy("instance_id").agg(*columns)


def _is_complete(revisions: dict[str, str]) -> str:
    return " and ".join(f"{alias}_n_tokens is not null" for alias in revisions)


def _with_ratios(joined: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    from pyspark.sql import functions as F

    columns = {}
    for alias, revision in revisions.items():
        total, every_byte = F.col(f"{alias}_nll_sum_nats"), F.col(f"{alias}_n_bytes") == F.col("n_bytes")
        columns[f"{alias}_nll_mean"] = total / F.col(f"{alias}_n_tokens")
        columns[f"{alias}_bits_per_byte"] = F.when(
            every_byte & (F.col("n_bytes") > 0), total / (F.lit(math.log(2)) * F.col("n_bytes"))
        )
        columns[f"{alias}_revision"] = F.lit(revision)
    return joined.withColumns(columns)
