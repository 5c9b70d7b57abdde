"""The rows of `rejects` for instances that a model could not score or continue. Driver only.

Input: ids of instances with stage, reason and detail. Output: one append to `rejects`, under (query_id, batch_id). The
id of a reject is a hash of stage and instance, so a replay, which may not know the reason any more, makes the same id.
"""

from typing import TYPE_CHECKING

from miniplm_udf import schemas
from miniplm_udf.store import tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def append(failed: "DataFrame", rejects_uri: str, query_id: str, batch_id: int) -> None:
    """Appends rejects, if there are any.

    Args:
        failed: columns stage, instance_id, reason and detail.
        rejects_uri: location of the table `rejects`.
        query_id: id of the query; with `batch_id` it names the commit.
        batch_id: number of the micro-batch.
    """
    from pyspark.sql import functions as F

    rows = failed.select(
        F.md5(F.concat_ws("/", "stage", "instance_id").cast("binary")).alias("reject_id"),
        "stage",
        "reason",
        "detail",
        F.lit(None).cast("string").alias("source_file"),
        "instance_id",
        F.lit(None).cast("binary").alias("raw"),
        F.lit(None).cast("bigint").alias("n_bytes"),
        F.current_timestamp().alias("rejected_at"),
        F.lit(query_id).alias("query_id"),
        F.lit(batch_id).cast("bigint").alias("batch_id"),
    ).persist()
    try:
        # If an earlier attempt has written them, Delta drops the write by its (query_id, batch_id).
        if not rows.isEmpty():
            tables.append(rows, rejects_uri, schemas.REJECTS, query_id, batch_id)
    finally:
        rows.unpersist()
