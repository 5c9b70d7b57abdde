"""The record of take-downs: the table `takedowns`, which outlives what it tells of. Driver only.

One row for each document that was asked for (`documents`), and for each instance and table what was removed there; ids,
numbers, when and by which command, never text. Rows are added before anything is removed, so that a take-down that was
killed goes on from the record, and ingest refuses the documents from then on. Owns the record; removes nothing
(takedown.py), and no row of it is ever removed.
"""

import dataclasses
import datetime
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miniplm_udf import schemas, storage, tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DOCUMENTS = "documents"
# The key of a table that went as a whole.
WHOLE = "*"


@dataclasses.dataclass(frozen=True)
class Takedown:
    """One command: who asked, and why. `reason` is kept as it is given."""

    command: str
    reason: str | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)


def takedowns_uri(root: str) -> str:
    return storage.join(storage.to_uri(root), "tables", schemas.TAKEDOWNS.name)


def document_ids(spark: "SparkSession", root: str) -> list[str]:
    """The documents that were ever taken down, sorted; ingest refuses them."""
    return [] if (found := _of_table(spark, root, DOCUMENTS)) is None else sorted(row[0] for row in found.collect())


def instance_ids(spark: "SparkSession", root: str) -> "DataFrame | None":
    """The instances that were ever taken down, as the one column `instance_id`; None where there is no record."""
    found = _of_table(spark, root, schemas.INSTANCES.name)
    return None if found is None else found.withColumnRenamed("key", "instance_id")


def _of_table(spark: "SparkSession", root: str, table: str) -> "DataFrame | None":
    from pyspark.sql import functions as F

    if not tables.exists(spark, takedowns_uri(root)):
        return None
    record = tables.read(spark, takedowns_uri(root))
    return record.where(F.col("table") == table).select("key").distinct()


def ask(spark: "SparkSession", root: str, takedown: Takedown, ids: Iterable[str]) -> None:
    """Records the documents that are asked for, unless they were before."""
    known = set(document_ids(spark, root))
    new = [(one, 0) for one in sorted(set(ids)) if one not in known]
    add(spark, root, takedown, DOCUMENTS, spark.createDataFrame(new, "key string, n_rows bigint"))


def add(spark: "SparkSession", root: str, takedown: Takedown, table: str, rows: "DataFrame") -> None:
    """Records what will be removed of a table.

    Args:
        rows: `key` and `n_rows`.
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
    tables.append(added, takedowns_uri(root), schemas.TAKEDOWNS)
