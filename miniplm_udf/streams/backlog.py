"""How many rows of a Delta table a stream has still to read, from the stream's offset and the table's history.

Input: the end offset of a Delta source, as Spark reports it. Output: a number of rows. An offset is (reservoirVersion
v, index i): the stream has read all versions before v, and the files of v up to the i-th; with isStartingVersion, v
means the whole table at that version. Spark itself reports no backlog for a Delta source. Reads the log, never
data. Driver only.
"""

from typing import TYPE_CHECKING, Any

from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def rows_behind(spark: "SparkSession", uri: str, offset: Json | None) -> int:
    """Counts the rows that were appended and not read yet.

    Args:
        uri: the table that the stream reads.
        offset: end offset of the newest finished micro-batch; None if nothing is read yet.

    Returns:
        A number of rows; in a version that is partly read, the rows are taken as spread evenly over its files.
    """
    from delta.tables import DeltaTable

    if offset is None:
        return spark.read.format("delta").load(uri).count()
    at, is_start = int(offset["reservoirVersion"]), bool(offset["isStartingVersion"])
    log = DeltaTable.forPath(spark, uri)
    # Only as far back as the offset: Delta reads the history commit by commit, and it grows with every micro-batch.
    newest = int(log.history(1).select("version").collect()[0][0])
    # A MERGE or DELETE reports the rows that it copies as output; streams skip these commits.
    history = log.history(max(1, newest - at + 1)).where(f"version >= {at} and operation not in ('MERGE', 'DELETE')")
    appended = {row["version"]: row for row in history.select("version", "operationMetrics").collect()}
    behind = sum(_metric(row, "numOutputRows") for version, row in appended.items() if version > at)
    if is_start:
        table = spark.read.format("delta").option("versionAsOf", at).load(uri)
        n_rows, n_files = table.count(), len(table.inputFiles())
    else:
        row = appended.get(at)
        n_rows, n_files = (_metric(row, "numOutputRows"), _metric(row, "numFiles")) if row is not None else (0, 0)
    n_read = max(0, int(offset["index"]) + 1)
    return behind + (round(n_rows * max(0, n_files - n_read) / n_files) if n_files else 0)


def _metric(row: Any, name: str) -> int:
    # A commit that adds no rows (table creation, compaction, properties) has no such metric.
    return int((row["operationMetrics"] or {}).get(name, 0))
