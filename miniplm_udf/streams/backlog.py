"""How much of a Delta table a stream has still to read, told from the stream's offset and the table's history.

Input: the end offset of a Delta source, as Spark reports it. Output: rows. Reads the log, never data. An offset is
(reservoirVersion v, index i): all of the versions before v are read, and of v the files up to the i-th; with
isStartingVersion, v stands for the whole table as it was then. Spark reports no backlog of a Delta source itself.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def rows_behind(spark: "SparkSession", uri: str, offset: dict[str, Any] | None) -> int:
    """Rows that were appended and not read yet; those of a version that is half read by the share of its files.

    Args:
        uri: of the table that is read.
        offset: the end offset of the newest finished micro-batch; None: nothing is read yet.
    """
    from delta.tables import DeltaTable

    if offset is None:
        return spark.read.format("delta").load(uri).count()
    at, is_start = int(offset["reservoirVersion"]), bool(offset["isStartingVersion"])
    log = DeltaTable.forPath(spark, uri)
    # As far back as the offset: a whole history is read commit by commit, and grows with every micro-batch.
    newest = int(log.history(1).select("version").collect()[0][0])
    # A deletion counts the rows that it copies; streams pass over it.
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
    # A commit of no rows of its own (table creation, compaction, properties) has no such number.
    return int((row["operationMetrics"] or {}).get(name, 0))
