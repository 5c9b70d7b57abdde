"""The join of chosen instances with their texts, for whatever takes text out of a root: pack, export, inspect.

    rows (instance_id, ...; narrow) + columns of `instances` (wide) -> rows with these columns, in parts by id

Owns the way of joining and nothing else: no table, no column. Driver; it plans and runs no job of its own. Texts are
never sorted and no side is held whole, so the memory of a task is that of one part's narrow rows, whatever the number
of instances. The same rows come out however often tasks are run; their order within a part is no one's.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# The narrow rows of a part are a hash table, some 300 bytes a row: 75 MB for each task that runs at once.
MOST_ROWS_PER_PART = 250_000
# What an id takes in the hash table that a broadcast sends to every executor.
_BYTES_PER_ID = 100


def texts_of(
    rows: "DataFrame", instances: "DataFrame", columns: Sequence[str], n_rows: int, n_parts: int | None = None
) -> "DataFrame":
    """The rows whose instance is there, with columns of it beside.

    Spark would choose a sort-merge join, which sorts the texts: it writes them to disk and reads them once more. Here
    both sides are sent to parts by a hash of the id; in each, the narrow rows become a hash table that the texts
    stream past. The number of parts follows the number of rows, so that a table always fits (Spark does not spill
    one). Where the ids are few enough for Spark's broadcasts (`spark.sql.autoBroadcastJoinThreshold`), each task that
    reads texts has them all first, and texts that no row wants are not sent anywhere.

    Args:
        rows: with `instance_id`, each once; none of `columns`.
        columns: of `instances`.
        n_rows: number of `rows`; it need not be exact.
        n_parts: partitions of the result; by default as many as shuffles have, or more where a part would be too large.
    """
    from pyspark.sql import functions as F

    spark = rows.sparkSession
    if n_parts is None:
        n_parts = max(int(str(spark.conf.get("spark.sql.shuffle.partitions"))), math.ceil(n_rows / MOST_ROWS_PER_PART))
    texts = instances.select("instance_id", *columns)
    java: Any = spark
    if n_rows * _BYTES_PER_ID <= java._jsparkSession.sessionState().conf().autoBroadcastJoinThreshold():
        texts = texts.join(F.broadcast(rows.select("instance_id")), "instance_id", "left_semi")
    parted = rows.repartition(n_parts, "instance_id").hint("shuffle_hash")
    return texts.repartition(n_parts, "instance_id").join(parted, "instance_id")
