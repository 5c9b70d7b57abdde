"""The query that keeps `score_matrix`, the wide form of `scores`, from the committed rows of `scores`. Driver only.

    scores (one row for each pair of instance and model) -> one row for each instance, five columns for each alias

An instance appears once all configured revisions have scored it, and only once. The query's checkpoint belongs to one
ordered set of (alias, revision). Micro-batch 0 replaces the table, later micro-batches append, each in one commit under
(query_id, batch_id), so a replay writes nothing twice. The table can be rebuilt from `scores` at any time: if another
checkpoint's query wrote it, this checkpoint is deleted and the query starts from the beginning.

    bits_per_byte = nll_sum_nats / (ln 2 * n_bytes), null unless every byte of the text was scored
"""

import logging
import math
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.layout import Root
from miniplm_udf.store import batch_range, tables
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.query import Query, belongs_to_checkpoint

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.matrix")

# Columns of the instance, which each row of `scores` repeats.
_INSTANCE_COLUMNS = ("instance_id", "source", "split", "content_hash", "text_bytes", "instance_batch_id")
_SCORE_COLUMNS = ("nll_sum_nats", "n_tokens", "n_bytes")


def checkpoint_name(revisions: dict[str, str]) -> str:
    """The name of the checkpoint of the query that keeps the matrix of these models.

    Args:
        revisions: model revisions by alias, in the order of the columns.
    """
    return "score_matrix-" + fingerprint(list(revisions.items()))


class MatrixQuery(Query):
    """The query that brings `score_matrix` up to date with `scores`; makes the empty table `scores` if there is none.

    Args:
        spark: a session.
        revisions: model revisions by alias, in the order of the columns.
        root: the root of `scores` and `score_matrix`.
        checkpoint_uri: checkpoint of this query (`checkpoint_name`).
        config: bytes of a micro-batch.
    """

    waits = True

    def __init__(
        self, spark: "SparkSession", revisions: dict[str, str], root: Root, checkpoint_uri: str, config: ScoreConfig
    ) -> None:
        # The table's lease: another set of models would replace the table while this query runs.
        facts = QueryFacts(stage="score_matrix", lease="score_matrix", source="scores", revisions=revisions)
        super().__init__("score_matrix", facts, checkpoint_uri)
        self._spark, self._revisions, self._root, self._config = spark, revisions, root, config
        self._scores_uri = root.table("scores")
        batch_range.create(spark, self._scores_uri, schemas.SCORES, root.table("instances"))

    def source(self) -> "DataFrame":
        # Only here are the leases held: before, another driver could be using the checkpoint.
        table = schemas.score_matrix(list(self._revisions))
        if not belongs_to_checkpoint(self._spark, self._root.table("score_matrix"), table, self.checkpoint_uri):
            LOGGER.info("score_matrix: built again for %s", ", ".join(self._revisions))
            storage.remove_folder(self.checkpoint_uri)
        return (
            self._spark.readStream.format("delta")
            .option("maxBytesPerTrigger", self._config.max_bytes_per_trigger)
            # Only a take-down changes rows that are in the table.
            .option("skipChangeCommits", "true")
            .load(self._scores_uri)
            # Selected before `foreachBatch`: a micro-batch reads all columns of its stream, used or not.
            .select(*_INSTANCE_COLUMNS, "model_revision", *_SCORE_COLUMNS)
        )

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        write_batch(batch, self._revisions, self._root, query_id, batch_id)
        tables.compact(self._spark, self._root.table("score_matrix"), batch_id)

    def backlog(self, offset: Any) -> int:
        return rows_behind(self._spark, self._scores_uri, offset)


def write_batch(batch: "DataFrame", revisions: dict[str, str], root: Root, query_id: str, batch_id: int) -> None:
    """Writes the instances that a micro-batch of `scores` completes.

    Args:
        batch: rows of `scores`, of any model.
        revisions: model revisions by alias, in the order of the columns.
        root: the root of `scores` and `score_matrix`.
        query_id: id of the query; with `batch_id` it names the commit.
        batch_id: number of the micro-batch; 0 replaces the table.
    """
    from pyspark.sql import functions as F

    uri, table = root.table("score_matrix"), schemas.score_matrix(list(revisions))
    wide = pivot(batch, revisions)
    complete = wide.where(_is_complete(revisions))
    persisted = []
    try:
        # With a single model every row completes its instance.
        if len(set(revisions.values())) > 1:
            persisted = [wide.persist()]
            persisted.append(_completed_now(wide, revisions, root, batch_id))
            complete = complete.unionByName(persisted[-1])
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
        for frame in persisted:
            frame.unpersist()


def _completed_now(wide: "DataFrame", revisions: dict[str, str], root: Root, batch_id: int) -> "DataFrame":
    """Instances whose rows are partly in this micro-batch and partly in other commits, if the matrix lacks them.

    Rows of earlier commits are in the table by now; micro-batches of later commits will find the rows of this commit.
    The frame is computed here and persisted (`unpersist` it), so that the write does not read the table that it writes.
    """
    spark = wide.sparkSession
    scores_uri, instances_uri = root.table("scores"), root.table("instances")
    partial = wide.where(f"not ({_is_complete(revisions)})").select("instance_id", "instance_batch_id")
    if partial.isEmpty():
        return wide.where("false")
    # Mostly these instances were rejected for a model and stay partial, so the search must stay as small as the batch.
    near = batch_range.condition(partial, scores_uri, instances_uri)
    scores = spark.read.format("delta").load(scores_uri).where(near)
    rest = pivot(scores.join(partial.select("instance_id"), "instance_id", "left_semi"), revisions)
    rest = rest.where(_is_complete(revisions))
    if batch_id > 0:
        written = spark.read.format("delta").load(root.table("score_matrix")).where(near)
        rest = tables.missing_from(rest, written)
    rest = rest.persist()
    rest.count()
    return rest


def pivot(scores: "DataFrame", revisions: dict[str, str]) -> "DataFrame":
    """Joins rows of `scores` to one row per instance; rows of other revisions are left out.

    Args:
        scores: rows of `scores`, of any model.
        revisions: model revisions by alias, in the order of the columns.

    Returns:
        The instance's columns and, for each alias, `<alias>_nll_sum_nats`, `<alias>_n_tokens` and `<alias>_n_bytes`;
        null where the model has no score.
    """
    from pyspark.sql import functions as F

    distinct = sorted(set(revisions.values()))
    rows = scores.where(F.col("model_revision").isin(distinct))
    names = [(alias, revision, name) for alias, revision in revisions.items() for name in _SCORE_COLUMNS]
    if len(distinct) == 1:
        # Each row is another instance, so no shuffle is needed.
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
