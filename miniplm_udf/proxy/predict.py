"""`proxy_scores`: the proxy's prediction for every instance of the pool, written by a streaming query of its own.

    instances (split = pool) -> features -> prediction with the instance's columns, one append per micro-batch

Like a checkpoint of `score_matrix`, which belongs to one set of models, a checkpoint of this query belongs to one
proxy: micro-batch 0 replaces the table and later micro-batches append, each in one commit under (query_id, batch_id). A
replay writes nothing twice, and the next run predicts new instances. Predictions are cheap: if the table was not
written from this checkpoint, the checkpoint is removed and all predictions are made again. Driver only; texts and
features stay in the executors' JVM.
"""

import logging
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.proxy import features
from miniplm_udf.store import proxy_records, tables
from miniplm_udf.store.proxy_records import ProxyRecord
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.query import Query, belongs_to_checkpoint

if TYPE_CHECKING:
    from pyspark.ml.regression import LinearRegressionModel
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.proxy")

_CARRIED = ("instance_id", "source", "split", "n_bytes", "content_hash", "instance_batch_id")


class PredictionQuery(Query):
    """The query that brings `proxy_scores` up to date with `instances`.

    Args:
        spark: the session that the query runs in.
        config: the experiment.
        record: record of the proxy in use.
    """

    waits = True

    def __init__(self, spark: "SparkSession", config: ExperimentConfig, record: ProxyRecord) -> None:
        from pyspark.ml.regression import LinearRegressionModel

        facts = QueryFacts(
            # The table's lease: another proxy would replace the table while this query runs.
            stage="proxy", lease="proxy_scores", source="instances", revisions={"proxy": record.revision},
        )  # fmt: skip
        super().__init__("proxy_scores", facts, config.layout.checkpoint(f"proxy-{record.revision}"))
        self._spark, self._config, self._record = spark, config, record
        self._instances_uri = config.layout.table("instances")
        self._uri = config.layout.table(schemas.PROXY_SCORES.name)
        self._model = LinearRegressionModel.load(proxy_records.model_uri(config.root, record.revision))

    def source(self) -> "DataFrame":
        # The leases are held only from here on; before, another driver could be using the checkpoint.
        if not belongs_to_checkpoint(self._spark, self._uri, schemas.PROXY_SCORES, self.checkpoint_uri):
            LOGGER.info("proxy_scores: built again by the proxy %s", self._record.revision[:8])
            storage.remove_folder(self.checkpoint_uri)
        reader = self._spark.readStream.format("delta")
        reader = reader.option("maxBytesPerTrigger", self._config.score.max_bytes_per_trigger)
        # Commits that change rows are skipped: only take-downs make them.
        instances = reader.option("skipChangeCommits", "true").load(self._instances_uri).where("split = 'pool'")
        return instances.withColumnRenamed("batch_id", "instance_batch_id").select(*_CARRIED, "text")

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        rows = predicted(batch, self._record, self._model, query_id, batch_id)
        write = tables.append if batch_id else tables.overwrite
        write(rows, self._uri, schemas.PROXY_SCORES, query_id=query_id, batch_id=batch_id)
        LOGGER.info("proxy: micro-batch %d is predicted", batch_id)
        tables.compact(self._spark, self._uri, batch_id)

    def backlog(self, offset: Any) -> int:
        return rows_behind(self._spark, self._instances_uri, offset)


def predicted(
    batch: "DataFrame", record: ProxyRecord, model: "LinearRegressionModel", query_id: str, batch_id: int
) -> "DataFrame":
    """Predicts instances.

    Args:
        batch: instances, with `text` and `instance_batch_id`.
        record: record of the proxy.
        model: its coefficients.
        query_id: written to each row.
        batch_id: written to each row.

    Returns:
        Rows of `proxy_scores`.
    """
    from pyspark.sql import functions as F

    ratios = list(record.tokens_per_byte_of.items())
    rates = batch.sparkSession.createDataFrame(ratios, "source string, tokens_per_byte double")
    predictions = model.transform(features.with_features(batch, record.identity["features"]))
    rate = F.coalesce("tokens_per_byte", F.lit(record.tokens_per_byte))
    tokens = F.greatest(F.lit(1), F.round(F.col("n_bytes") * rate)).cast("bigint")
    return predictions.join(F.broadcast(rates), "source", "left").select(
        "instance_id", "source", "split", "n_bytes", "content_hash",
        tokens.alias("estimated_tokens"),
        "prediction",
        F.lit(record.revision).alias("proxy_revision"),
        "instance_batch_id",
        F.lit(query_id).alias("query_id"),
        F.lit(batch_id).cast("bigint").alias("batch_id"),
    )  # fmt: skip
