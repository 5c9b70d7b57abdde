"""Packed ingest on the driver: first deduplicates the documents of a micro-batch, then packs them.

    input rows -> documents, rejects -> first copy in the micro-batch -> state store: first copy of all -> foreachBatch:
    without documents of other queries -> packed in the order of the input -> instances, document keys, rejects

Duplicates are dropped before packing, because an instance depends on its neighbours: the same document in two files
would make two instances with different ids. Owns the table `document_keys`, which says in which instance each document
begins. The table is read only after a lost checkpoint, with a second format, or if a file has changed between a
micro-batch and its replay. A key without its instance (its writer was killed between the two tables) does not count. A
replay finds the same copies, and so the same instances (copies.py).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.ingestion.batches import refuse_taken_down
from miniplm_udf.ingestion.copies import DOCUMENT, first_copies, read_function, rows_spark_schema
from miniplm_udf.ingestion.splits import INSTANCE, REJECT, output_spark_schema
from miniplm_udf.ingestion.summary import observed
from miniplm_udf.store import tables, takedowns

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    PackFunction = Callable[[Iterator[Any]], Iterator[Any]]

LOGGER = logging.getLogger("miniplm.ingest")


def first_documents(rows: "DataFrame", config: ExperimentConfig) -> "DataFrame":
    """Makes the streaming frame of documents and rejects, each key once.

    Args:
        rows: the streaming frame of the input (`inputs.stream`).
        config: the experiment.

    Returns:
        A frame with the columns of `copies.rows_spark_schema`.
    """
    schema = rows_spark_schema()
    read = observed(rows.mapInArrow(read_function(config.ingest), schema))
    # Without a number of partitions, Spark takes the state store's number, even if the config has another number now.
    return read.repartition("key").mapInArrow(first_copies, schema).dropDuplicates(["key"])


def packed_sample(rows: "DataFrame", config: ExperimentConfig, pack: "PackFunction") -> "DataFrame":
    """Packs the rows of a sample as ingest does, each document once.

    Args:
        rows: a batch frame with the columns of `inputs.stream`, except `modified_micros`.
        config: the experiment.
        pack: the function of `copies.pack_function`.

    Returns:
        A batch frame with the columns of `splits.output_spark_schema`.
    """
    from pyspark.sql import functions as F

    schema, packed_schema = rows_spark_schema(), output_spark_schema()
    read = rows.withColumn("modified_micros", F.lit(0).cast("bigint")).mapInArrow(read_function(config.ingest), schema)
    first = read.repartition(1).mapInArrow(first_copies, schema)
    documents = first.where(f"kind = '{DOCUMENT}'").sortWithinPartitions("place", "row")
    rejects = first.where(f"kind = '{REJECT}'").select(*packed_schema.names)
    return documents.mapInArrow(pack, packed_schema).unionByName(rejects)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Packs the micro-batches of one query.

    Attributes:
        config: the experiment.
        pack: the function of `copies.pack_function`.
        changed_uri: the file that holds the numbers of micro-batches whose files have changed before a replay.
    """

    config: ExperimentConfig
    pack: "PackFunction"
    changed_uri: str

    @contextlib.contextmanager
    def packed(self, batch: "DataFrame", query_id: str, batch_id: int) -> Iterator["DataFrame"]:
        """Packs a micro-batch; its documents stay persisted while the block runs.

        Args:
            batch: rows of `first_documents`.
            query_id: id of the query.
            batch_id: number of the micro-batch.

        Yields:
            The rows to write, with the columns of `splits.output_spark_schema`.
        """
        from pyspark.sql import functions as F

        batch.persist()
        try:
            # The batch is read completely first, because the state store is written while its rows are read.
            n_places = batch.agg(F.count_distinct("place")).collect()[0][0]
            changed = storage.read_json(self.changed_uri) or []
            others = (F.col("query_id") != query_id) | F.col("batch_id").isin(changed)
            own = (F.col("query_id") == query_id) & (F.col("batch_id") == batch_id)
            rows = self._rows(batch, others, n_places)
            if batch_id not in changed and self._has_changed(rows, others, own):
                LOGGER.warning("ingest: a file has changed since micro-batch %d was begun; it is read again", batch_id)
                storage.write_json(self.changed_uri, [*changed, batch_id])
                rows = self._rows(batch, others | own, n_places)
            yield rows
        finally:
            batch.unpersist()

    def _rows(self, batch: "DataFrame", others: "Column", n_places: int) -> "DataFrame":
        # The lease is held, which a take-down waits for: no document is taken down while this runs.
        taken_down = takedowns.document_ids(batch.sparkSession, self.config.root)
        documents = self._unknown(batch.where(f"kind = '{DOCUMENT}'"), others, taken_down)
        ordered = documents.repartition(max(1, n_places), "place").sortWithinPartitions("place", "row")
        schema = output_spark_schema()
        rejects = batch.where(f"kind = '{REJECT}'").select(*schema.names)
        return refuse_taken_down(ordered.mapInArrow(self.pack, schema), taken_down).unionByName(rejects)

    def _unknown(self, documents: "DataFrame", others: "Column", taken_down: list[str]) -> "DataFrame":
        """The documents that no other query has ingested, and documents that were taken down, which become rejects.

        Documents whose instance was removed because of another document in it are not ingested again.
        """
        from pyspark.sql import functions as F

        spark = documents.sparkSession
        keys = tables.read(spark, self.config.layout.table(schemas.DOCUMENT_KEYS.name)).where(others)
        if keys.isEmpty():
            return documents
        ids = tables.read(spark, self.config.layout.table("instances")).select("instance_id")
        if (removed := takedowns.instance_ids(spark, self.config.root)) is not None:
            ids = ids.unionAll(removed)
        ingested = keys.join(ids, "instance_id", "left_semi").withColumnRenamed("document_key", "key")
        is_taken_down = F.col("document_id").isin(taken_down)
        return tables.missing_from(documents.where(~is_taken_down), ingested, "key").unionByName(
            documents.where(is_taken_down)
        )

    def _has_changed(self, rows: "DataFrame", others: "Column", own: "Column") -> bool:
        """Whether a replay makes instances that its first run did not make; False if that run wrote none."""
        existing = tables.read(rows.sparkSession, self.config.layout.table("instances"))
        if existing.where(own).isEmpty():
            return False
        instances = rows.where(f"kind = '{INSTANCE}'").select("instance_id")
        return not tables.missing_from(instances, existing.where(others | own)).isEmpty()
