"""`proxy_scores`: the proxy's prediction for every instance of the pool, kept by a streaming query of its own.

    instances (split = pool) -> features -> prediction, beside the instance's place, in one append a micro-batch

The query's checkpoint belongs to one proxy, as that of `score_matrix` does to one set of models: its micro-batch 0
replaces the table, later ones append, each in one commit under (query_id, batch_id), so a replay writes nothing twice
and new instances are predicted by the next run. Predictions are cheap: where the table is not the work of this
checkpoint, the checkpoint is dropped and all are made anew. Driver only; text and features stay in the executors' JVM.
"""

import logging
from typing import TYPE_CHECKING

from miniplm_udf import proxy_records, schemas, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.proxy import features
from miniplm_udf.proxy_records import ProxyRecord
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.query import Query

if TYPE_CHECKING:
    from pyspark.ml.regression import LinearRegressionModel
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.proxy")

_CARRIED = ("instance_id", "source", "split", "n_bytes", "content_hash", "instance_batch_id")


def prediction_query(spark: "SparkSession", config: ExperimentConfig, record: ProxyRecord) -> Query:
    """The query that brings `proxy_scores` up to date with `instances`.

    Args:
        record: of the proxy in use.
    """
    from pyspark.ml.regression import LinearRegressionModel

    instances_uri, uri = config.table_uri("instances"), config.table_uri(schemas.PROXY_SCORES.name)
    checkpoint_uri = config.checkpoint_uri(f"proxy-{record.revision}")
    model = LinearRegressionModel.load(proxy_records.model_uri(config.root, record.revision))

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        rows = predicted(batch, record, model, query_id, batch_id)
        write = tables.append if batch_id else tables.overwrite
        write(rows, uri, schemas.PROXY_SCORES, query_id=query_id, batch_id=batch_id)
        LOGGER.info("proxy: micro-batch %d is predicted", batch_id)
        tables.compact(spark, uri, batch_id)

    def source() -> "DataFrame":
        # Here, once the query is ours: another driver's would be in use.
        if not tables.is_work_of(spark, uri, schemas.PROXY_SCORES, checkpoint_uri):
            LOGGER.info("proxy_scores: made anew by the proxy %s", record.revision[:8])
            storage.remove_folder(checkpoint_uri)
        reader = spark.readStream.format("delta").option("maxBytesPerTrigger", config.score.max_bytes_per_trigger)
        # Only a take-down changes rows that are there.
        instances = reader.option("skipChangeCommits", "true").load(instances_uri).where("split = 'pool'")
        return instances.withColumnRenamed("batch_id", "instance_batch_id").select(*_CARRIED, "text")

    return Query(
        name="proxy_scores",
        # Of the table: another proxy would replace it under us.
        lease="proxy_scores",
        waits=True,
        checkpoint_uri=checkpoint_uri,
        source=source,
        micro_batch=micro_batch,
        backlog=lambda offset: rows_behind(spark, instances_uri, offset),
    )


def predicted(
    batch: "DataFrame", record: ProxyRecord, model: "LinearRegressionModel", query_id: str, batch_id: int
) -> "DataFrame":
    """Rows of `proxy_scores`.

    Args:
        batch: of instances, with `text`.
    """
    from pyspark.sql import functions as F

    ratios = list(record.tokens_per_byte_of.items())
    known = batch.sparkSession.createDataFrame(ratios, "source string, tokens_per_byte double")
    made = model.transform(features.with_features(batch, record.identity["features"]))
    rate = F.coalesce("tokens_per_byte", F.lit(record.tokens_per_byte))
    tokens = F.greatest(F.lit(1), F.round(F.col("n_bytes") * rate)).cast("bigint")
    return made.join(F.broadcast(known), "source", "left").select(
        "instance_id", "source", "split", "n_bytes", "content_hash",
        tokens.alias("estimated_tokens"),
        "prediction",
        F.lit(record.revision).alias("proxy_revision"),
        "instance_batch_id",
        F.lit(query_id).alias("query_id"),
        F.lit(batch_id).cast("bigint").alias("batch_id"),
    )  # fmt: skip
