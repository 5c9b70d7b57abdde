"""How many rows of a Delta table a stream has still to read, from the stream's offset and the table's history.

Input: the end offset of a Delta source, as Spark reports it. Output: a number of rows. An offset is (reservoirVersion
v, index i): the stream has read all versions before v, and the files of v up to the i-th; with isStartingVersion, v
means the whole table at that version. Spark itself reports no backlog for a Delta source. Reads the log, never
data. Driver only.
"""

import itertools
from typing import TYPE_CHECKING

from miniplm_udf.storage import Json
from miniplm_udf.store import delta_log

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
    if offset is None:
        return spark.read.format("delta").load(uri).count()
    at, is_start = int(offset["reservoirVersion"]), bool(offset["isStartingVersion"])
    # Only as far back as the offset: the log grows with every micro-batch.
    unread = itertools.takewhile(lambda commit: commit.version >= at, delta_log.commits(uri))
    # A MERGE or DELETE reports the rows that it copies as output; streams skip these commits.
    appended = {commit.version: commit for commit in unread if commit.operation not in ("MERGE", "DELETE")}
    behind = sum(commit.metric("numOutputRows") for version, commit in appended.items() if version > at)
    if is_start:
        table = spark.read.format("delta").option("versionAsOf", at).load(uri)
        n_rows, n_files = table.count(), len(table.inputFiles())
    else:
        commit = appended.get(at)
        n_rows, n_files = (commit.metric("numOutputRows"), commit.metric("numFiles")) if commit else (0, 0)
    n_read = max(0, int(offset["index"]) + 1)
    return behind + (round(n_rows * max(0, n_files - n_read) / n_files) if n_files else 0)
