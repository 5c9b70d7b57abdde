"""The join of chosen instances with their texts, for the commands that read text: pack, export, inspect.

    rows (instance_id, ...; narrow) + columns of `instances` (wide) -> rows with these columns, partitioned by id

Owns how the join is done; owns no table and no column. Runs on the driver, and only plans: it starts no job. Texts are
never sorted and no side is held in memory as a whole, so a task needs memory only for the narrow rows of one partition,
whatever the number of instances. A retried task gives the same rows; their order within a partition is not defined.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# The narrow rows of a partition become a hash table of about 300 bytes per row: 75 MB for each concurrent task.
MOST_ROWS_PER_PART = 250_000
# Bits per id. With 16, about 6 % of the unwanted texts pass the filter.
_BITS_PER_ID = 16
# Largest filter: 32 MiB in each executor, enough for 16 million ids. With more ids there is no filter: all texts are
# shuffled.
_MOST_BITS = 1 << 28
_BITS_PER_WORD, _WORDS_PER_BLOCK = 64, 1024
_PLACE = "text_filter_place"


def texts_of(
    rows: "DataFrame", instances: "DataFrame", columns: Sequence[str], n_rows: int, n_parts: int | None = None
) -> "DataFrame":
    """Joins rows with columns of their instances; rows without an instance are dropped.

    Spark would choose a sort-merge join, which sorts the texts: it writes them to disk and reads them again. Here both
    sides are partitioned by a hash of the id; in each partition the narrow rows become a hash table, and the texts
    stream past it. The number of partitions follows the number of rows, so that a hash table always fits in memory
    (Spark does not spill it). Each task that reads texts has a Bloom filter of the ids and drops most unwanted texts
    before the shuffle. For this filter the rows are computed twice.

    Args:
        rows: a frame with `instance_id`, each id once, and without any of `columns`.
        instances: the table `instances`.
        columns: names of the columns of `instances` to add.
        n_rows: number of `rows`; it need not be exact.
        n_parts: partitions of the result; None takes as many as shuffles have, or more if a partition would be too
            large.

    Returns:
        `rows` with `columns`.
    """
    if n_parts is None:
        n_shuffled = int(str(rows.sparkSession.conf.get("spark.sql.shuffle.partitions")))
        n_parts = max(n_shuffled, math.ceil(n_rows / MOST_ROWS_PER_PART))
    texts = maybe_wanted(instances.select("instance_id", *columns), rows, n_rows)
    parted = rows.repartition(n_parts, "instance_id").hint("shuffle_hash")
    return texts.repartition(n_parts, "instance_id").join(parted, "instance_id")


def maybe_wanted(texts: "DataFrame", rows: "DataFrame", n_rows: int) -> "DataFrame":
    """Returns the texts, without most of the texts whose id is in no row; uses a Bloom filter of one hash.

    The filter is a table of blocks; a block holds words of 64 bits. (Spark adds a Bloom filter by itself only if the
    rows come from a scan with a filter and the texts are more than 10 GB.)

    Args:
        texts: a frame with `instance_id`.
        rows: a frame with `instance_id`, the wanted ids.
        n_rows: number of `rows`; it need not be exact.
    """
    from pyspark.sql import functions as F

    block_bits = _BITS_PER_WORD * _WORDS_PER_BLOCK
    n_bits = block_bits * max(1, math.ceil(n_rows * _BITS_PER_ID / block_bits))
    if n_bits > _MOST_BITS:
        return texts
    # Not the hash by which Spark partitions rows, nor a hash by which a user may have selected rows.
    place = F.pmod(F.xxhash64("instance_id", F.lit("text filter")), F.lit(n_bits)).alias(_PLACE)
    row_words = rows.select(place).selectExpr(f"{_PLACE} div {_BITS_PER_WORD} AS word", f"{_bit()} AS bits")
    empty_words = rows.sparkSession.range(n_bits // _BITS_PER_WORD).selectExpr("id AS word", "0L AS bits")
    words = row_words.union(empty_words).groupBy("word").agg(F.bit_or("bits").alias("bits"))
    blocks = (
        words.groupBy(F.expr(f"word div {_WORDS_PER_BLOCK}").alias("block"))
        .agg(F.array_sort(F.collect_list(F.struct("word", "bits"))).alias("words"))
        .select("block", F.col("words.bits").alias("words"))
    )
    number = f"cast({_PLACE} div {_BITS_PER_WORD} % {_WORDS_PER_BLOCK} AS int)"
    is_set = F.expr(f"element_at(words, {number} + 1) & {_bit()} != 0")
    at = F.expr(f"{_PLACE} div {block_bits}") == F.col("block")
    return texts.withColumn(_PLACE, place).join(F.broadcast(blocks), at & is_set, "left_semi").drop(_PLACE)


def _bit() -> str:
    """SQL: the bit of `_PLACE` within its word."""
    return f"shiftleft(1L, cast({_PLACE} % {_BITS_PER_WORD} AS int))"
