"""Writes a micro-batch of ingest; instances of documents that were taken down become rejects. Driver only.

Input: rows of `splits.output_spark_schema`, each key once. Output: appends to `document_keys` (packed chunking only),
`instances` and `rejects`, in this order, each under the micro-batch's (query, batch), so that a replay writes nothing
twice. If a file has changed between a micro-batch and its replay, the rows that the tables lack are added.
"""

import datetime
import logging
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.ingestion.copies import DOCUMENT
from miniplm_udf.ingestion.documents import RAW_BYTES, STAGE
from miniplm_udf.ingestion.splits import INSTANCE, REJECT
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LOGGER = logging.getLogger("miniplm.ingest")

# The key of the reject of a refused instance is the MD5 of this prefix and the instance's id.
REFUSED_PREFIX = "taken_down/"


def refuse_taken_down(rows: "DataFrame", taken_down: list[str]) -> "DataFrame":
    """Returns the rows, with a reject without text for each instance that has a document that was taken down.

    The whole instance is refused, after documents were cut, so that a refusal never moves the cuts of its neighbours.

    Args:
        rows: rows of `splits.output_spark_schema`.
        taken_down: ids of documents that were taken down.
    """
    from pyspark.sql import functions as F

    if not taken_down:
        return rows
    refused_ids = F.array_intersect("document_ids", F.lit(taken_down))
    is_refused = (F.col("kind") == INSTANCE) & (F.size(refused_ids) > 0)
    detail = F.concat(F.lit("of documents that were taken down: "), F.array_join(refused_ids, ", "))
    values = {
        "kind": F.lit(REJECT), "key": F.md5(F.concat(F.lit(REFUSED_PREFIX), "key").cast("binary")),
        "reason": F.lit("taken_down"), "detail": F.substring(detail, 1, RAW_BYTES),
        # The instance is in no table, so its reject names none.
        "instance_id": F.lit(None), "text": F.lit(None), "metadata": F.lit(None),
    }  # fmt: skip
    return rows.select(
        *(
            F.when(is_refused, values[name]).otherwise(F.col(name)).alias(name) if name in values else F.col(name)
            for name in rows.columns
        )
    )


def write_batch(batch: "DataFrame", query_id: str, batch_id: int, config: ExperimentConfig, changed_uri: str) -> None:
    """Appends a micro-batch to the tables that it has rows for; other tables get no empty commit.

    The batch is read completely before the first write: Delta skips the write of a replayed batch without reading it,
    and the state store would then miss its commit. If a file has changed between a micro-batch and its replay, the
    tables and the state store disagree on the batch: the rows that the table lacks are added, and the number of the
    batch is recorded, because its rows may come again and be new to the state store alone.

    Args:
        batch: rows of `splits.output_spark_schema`, each key once.
        query_id: id of the query.
        batch_id: number of the micro-batch.
        config: the experiment.
        changed_uri: the file that holds the numbers of micro-batches whose files have changed.
    """
    from pyspark.sql import functions as F

    spark = batch.sparkSession
    changed = storage.read_json(changed_uri) or []
    batch.persist()
    try:
        n_rows = {row["kind"]: row["count"] for row in batch.groupBy("kind").count().collect()}
        for kind, table, frame in _by_table(batch, query_id, batch_id):
            uri, key = config.layout.table(table.name), list(table.key)
            if kind == DOCUMENT and not n_rows.get(kind):
                continue
            existing = tables.read(spark, uri)
            written = existing.where((F.col("query_id") == query_id) & (F.col("batch_id") == batch_id))
            n_written = written.count()
            if not n_rows.get(kind) and not n_written:
                continue
            rows = frame.select(*table.column_names)
            # Rows of other queries, for example of a query whose checkpoint was lost. If there are none, Delta's file
            # statistics keep Spark from opening a file.
            others = existing.where((F.col("query_id") != query_id) | F.col("batch_id").isin([batch_id, *changed]))
            new = tables.missing_from(rows, others, key)
            if not n_written:
                tables.append(new, uri, table, query_id, batch_id)
                continue
            n_new = new.count()
            n_again = rows.join(written.select(*key), key, "left_semi").count()
            if (n_new or n_again < n_written) and batch_id not in changed:
                LOGGER.warning("ingest: a file has changed since micro-batch %d was begun; it is read again", batch_id)
                changed.append(batch_id)
                storage.write_json(changed_uri, changed)
            if n_new:
                tables.append(new, uri, table)
    finally:
        batch.unpersist()


def _by_table(batch: "DataFrame", query_id: str, batch_id: int) -> list[tuple[str, schemas.Table, "DataFrame"]]:
    """The rows of each kind with their table's columns, in the order in which the tables are written.

    Keys come first: a key without its instance does not count, but an instance needs the keys of its documents.
    """
    from pyspark.sql import functions as F

    now = F.lit(datetime.datetime.now(datetime.UTC))
    marked = batch.withColumns({"query_id": F.lit(query_id), "batch_id": F.lit(batch_id).cast("bigint")})
    keys = marked.where(F.col("kind") == DOCUMENT).withColumn("document_key", F.col("key"))
    instances = marked.where(F.col("kind") == INSTANCE).withColumn("ingested_at", now)
    rejects = marked.where(F.col("kind") == REJECT).withColumns(
        {"reject_id": F.col("key"), "stage": F.lit(STAGE), "rejected_at": now}
    )
    return [
        (DOCUMENT, schemas.DOCUMENT_KEYS, keys),
        (INSTANCE, schemas.INSTANCES, instances),
        (REJECT, schemas.REJECTS, rejects),
    ]
