"""The record of take-downs: the table `takedowns`, which outlives the rows that were removed. Driver only.

One row for each document that a user asked to remove (`documents`), and one for each instance and table in which rows
are removed: ids, numbers, time and command, never text. Rows are added before anything is removed, so that a killed
take-down continues from the record, and ingest refuses the documents from then on. Owns the record, of which no row is
ever removed; `corpora/takedown.py` removes the rows of the other tables.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.layout import Root
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DOCUMENTS = "documents"
# The key of a table that was removed as a whole.
WHOLE = "*"


@dataclasses.dataclass(frozen=True)
class Takedown:
    """One removal of documents (take-down): the command line that asked for it, and the user's reason, unchanged."""

    command: str
    reason: str | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


def document_ids(spark: "SparkSession", root: str) -> list[str]:
    """Reads the ids of all documents that were ever taken down; ingest refuses them.

    Args:
        spark: any session.
        root: URI of the root.

    Returns:
        Sorted ids; empty if nothing was ever taken down.
    """
    keys = _keys(spark, root, DOCUMENTS)
    return [] if keys is None else sorted(row[0] for row in keys.collect())


def instance_ids(spark: "SparkSession", root: str) -> "DataFrame | None":
    """Reads the ids of all instances that were ever taken down.

    Args:
        spark: any session.
        root: URI of the root.

    Returns:
        A frame with the column `instance_id`, each id once; None if nothing was ever taken down.
    """
    keys = _keys(spark, root, schemas.INSTANCES.name)
    return None if keys is None else keys.withColumnRenamed("key", "instance_id")


def _keys(spark: "SparkSession", root: str, table: str) -> "DataFrame | None":
    from pyspark.sql import functions as F

    if not tables.exists(spark, Root(root).table("takedowns")):
        return None
    record = tables.read(spark, Root(root).table("takedowns"))
    return record.where(F.col("table") == table).select("key").distinct()


def ask(spark: "SparkSession", root: str, takedown: Takedown, ids: Iterable[str]) -> None:
    """Records the documents that a user asks to remove, except documents that are recorded already.

    Args:
        spark: any session.
        root: URI of the root.
        takedown: the command that removes the documents.
        ids: the documents' ids; repeated ids are recorded once.
    """
    recorded = set(document_ids(spark, root))
    new = [(document, 0) for document in sorted(set(ids)) if document not in recorded]
    add(spark, root, takedown, DOCUMENTS, spark.createDataFrame(new, "key string, n_rows bigint"))


def add(spark: "SparkSession", root: str, takedown: Takedown, table: str, rows: "DataFrame") -> None:
    """Records the rows that will be removed from a table.

    Args:
        spark: any session.
        root: path or URI of the root.
        takedown: the command.
        table: name of the table, or `DOCUMENTS`.
        rows: columns `key` and `n_rows`.
    """
    from pyspark.sql import functions as F

    added = rows.select(
        F.lit(takedown.id).alias("takedown_id"),
        F.lit(table).alias("table"),
        "key",
        F.col("n_rows").cast("bigint"),
        F.lit(takedown.reason).cast("string").alias("reason"),
        F.lit(takedown.command).alias("command"),
        F.lit(datetime.datetime.now(datetime.UTC)).alias("taken_down_at"),
    )
    tables.append(added, Root(root).table("takedowns"), schemas.TAKEDOWNS)
