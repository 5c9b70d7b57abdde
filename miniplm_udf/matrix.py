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

from miniplm_udf import nearby, schemas, storage, tables
from miniplm_udf.config import ScoreConfig, fingerprint
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.query import Query

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.matrix")

# Of the instance, as each of its score rows has them.
_INSTANCE_COLUMNS = ("instance_id", "source", "split", "content_hash", "text_bytes", "instance_batch_id")
_SCORE_COLUMNS = ("nll_sum_nats", "n_tokens", "n_bytes")


def checkpoint_name(revisions: dict[str, str]) -> str:
    """The name of the query that keeps the matrix of these models.

    Args:
        revisions: model revisions by alias, in the order of the columns.
    """
    return "score_matrix-" + fingerprint(list(revisions.items()))


def matrix_query(
    spark: "SparkSession", revisions: dict[str, str], tables_uri: str, checkpoint_uri: str, config: ScoreConfig
) -> Query:
    """The query that brings `score_matrix` up to date with `scores`.

    Args:
        revisions: model revisions by alias, in the order of the columns.
        tables_uri: where `scores` and `score_matrix` are.
        checkpoint_uri: of this query (`checkpoint_name`).
    """
    scores_uri = storage.join(tables_uri, "scores")
    nearby.create_scores(spark, scores_uri, storage.join(tables_uri, "instances"))

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        write_batch(batch, revisions, tables_uri, query_id, batch_id)
        tables.compact(spark, storage.join(tables_uri, "score_matrix"), batch_id)

    def source() -> "DataFrame":
        # Here, once the query is ours: another driver's would be in use.
        table = schemas.score_matrix(list(revisions))
        if not tables.is_work_of(spark, storage.join(tables_uri, "score_matrix"), table, checkpoint_uri):
            LOGGER.info("score_matrix: built anew for %s", ", ".join(revisions))
            storage.remove_folder(checkpoint_uri)
        return (
            spark.readStream.format("delta")
            .option("maxBytesPerTrigger", config.max_bytes_per_trigger)
            # Only a take-down changes rows that are there.
            .option("skipChangeCommits", "true")
            .load(scores_uri)
            # Here, before `foreachBatch`: a micro-batch reads all columns of its stream, whatever is used of it.
            .select(*_INSTANCE_COLUMNS, "model_revision", *_SCORE_COLUMNS)
        )

    return Query(
        name="score_matrix",
        # Of the table: another set of models would replace it under us.
        lease="score_matrix",
        waits=True,
        checkpoint_uri=checkpoint_uri,
        source=source,
        micro_batch=micro_batch,
        backlog=lambda offset: rows_behind(spark, scores_uri, offset),
    )


def write_batch(batch: "DataFrame", revisions: dict[str, str], tables_uri: str, query_id: str, batch_id: int) -> None:
    """Writes the instances that this micro-batch of `scores` rows completes.

    Args:
        batch: rows of `scores`, of any model.
    """
    from pyspark.sql import functions as F

    uri, table = storage.join(tables_uri, "score_matrix"), schemas.score_matrix(list(revisions))
    wide = pivot(batch, revisions)
    complete = wide.where(_is_complete(revisions))
    kept = []
    try:
        # A single model's rows are complete by themselves.
        if len(set(revisions.values())) > 1:
            kept = [wide.persist()]
            kept.append(_completed_now(wide, revisions, tables_uri, batch_id))
            complete = complete.unionByName(kept[-1])
        rows = _with_ratios(complete, revisions).select(
            *(name for name in table.column_names if name not in ("query_id", "batch_id")),
            F.lit(query_id).alias("query_id"),
            F.lit(batch_id).cast("bigint").alias("batch_id"),
        )
        if batch_id == 0:
            tables.overwrite(rows, uri, table, query_id=query_id, batch_id=batch_id)
        else:
            tables.append(rows, uri, table, query_id, batch_id)
        LOGGER.info("score_matrix: micro-batch %d is written", batch_id)
    finally:
        for frame in kept:
            frame.unpersist()


def _completed_now(wide: "DataFrame", revisions: dict[str, str], tables_uri: str, batch_id: int) -> "DataFrame":
    """Instances of which this micro-batch holds some rows and other commits the rest, if the matrix lacks them.

    Of such a commit the earlier rows are in the table by now; the later ones will find these. Computed here and kept
    (`unpersist` it), so that the write does not read the table that it writes to.
    """
    spark = wide.sparkSession
    scores_uri, instances_uri = storage.join(tables_uri, "scores"), storage.join(tables_uri, "instances")
    partial = wide.where(f"not ({_is_complete(revisions)})").select("instance_id", "instance_batch_id")
    if partial.isEmpty():
        return wide.where("false")
    # Most often these have been rejected by a model, and stay partial: the look must cost what a micro-batch is worth.
    near = nearby.condition(partial, scores_uri, instances_uri)
    scores = spark.read.format("delta").load(scores_uri).where(near)
    rest = pivot(scores.join(partial.select("instance_id"), "instance_id", "left_semi"), revisions)
    rest = rest.where(_is_complete(revisions))
    if batch_id > 0:
        known = spark.read.format("delta").load(storage.join(tables_uri, "score_matrix")).where(near)
        rest = tables.missing_from(rest, known)
    rest = rest.persist()
    rest.count()
    return rest


def pivot(scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    """Rows of `scores`, one an instance: `<alias>_nll_sum_nats`, `_n_tokens`, `_n_bytes`; null where not scored."""
    from pyspark.sql import functions as F

    wanted = sorted(set(revisions.values()))
    rows = scores.where(F.col("model_revision").isin(wanted))
    names = [(alias, revision, name) for alias, revision in revisions.items() for name in _SCORE_COLUMNS]
    if len(wanted) == 1:
        # A row of it is an instance: the key of `scores`. No shuffle.
        return rows.select(*_INSTANCE_COLUMNS, *(F.col(name).alias(f"{alias}_{name}") for alias, _, name in names))
    columns = [
        F.max(F.when(F.col("model_revision") == revision, F.col(name))).alias(f"{alias}_{name}")
        for alias, revision, name in names
    ]
    return rows.groupBy(*_INSTANCE_COLUMNS).agg(*columns)


def _is_complete(revisions: dict[str, str]) -> str:
    return " and ".join(f"{alias}_n_tokens is not null" for alias in revisions)


def _with_ratios(wide: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    from pyspark.sql import functions as F

    columns = {}
    for alias, revision in revisions.items():
        total, every_byte = F.col(f"{alias}_nll_sum_nats"), F.col(f"{alias}_n_bytes") == F.col("text_bytes")
        columns[f"{alias}_nll_mean"] = total / F.col(f"{alias}_n_tokens")
        columns[f"{alias}_bits_per_byte"] = F.when(
            every_byte & (F.col("text_bytes") > 0), total / (F.lit(math.log(2)) * F.col("text_bytes"))
        )
        columns[f"{alias}_revision"] = F.lit(revision)
    return wide.withColumns(columns).withColumnRenamed("text_bytes", "n_bytes")
