"""The join of chosen instances with their texts, for whatever takes text out of a root: pack, export, inspect.

    rows (instance_id, ...; narrow) + columns of `instances` (wide) -> rows with these columns, in parts by id

Owns the way of joining and nothing else: no table, no column. Driver; it plans and runs no job of its own. Texts are
never sorted and no side is held whole, so the memory of a task is that of one part's narrow rows, whatever the number
of instances. The same rows come out however often tasks are run; their order within a part is no one's.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# The narrow rows of a part are a hash table, some 300 bytes a row: 75 MB for each task that runs at once.
MOST_ROWS_PER_PART = 250_000
# Of an id in the filter: with so many, 6 % of the texts that no row wants pass.
_BITS_PER_ID = 16
# Of the filter: 32 MiB in each executor. Of more ids, 16 million, none is made: all texts go through the shuffle.
_MOST_BITS = 1 << 28
_BITS_PER_WORD, _WORDS_PER_BLOCK = 64, 1024
_PLACE = "text_filter_place"


def texts_of(
    rows: "DataFrame", instances: "DataFrame", columns: Sequence[str], n_rows: int, n_parts: int | None = None
) -> "DataFrame":
    """The rows whose instance is there, with columns of it beside.

    Spark would choose a sort-merge join, which sorts the texts: it writes them to disk and reads them once more. Here
    both sides are sent to parts by a hash of the id; in each, the narrow rows become a hash table that the texts
    stream past. The number of parts follows the number of rows, so that a table always fits (Spark does not spill
    one). Most texts that no row wants are not sent anywhere: each task that reads texts has a Bloom filter of the ids.
    The rows are computed twice for it.

    Args:
        rows: with `instance_id`, each once; none of `columns`.
        columns: of `instances`.
        n_rows: number of `rows`; it need not be exact.
        n_parts: partitions of the result; by default as many as shuffles have, or more where a part would be too large.
    """
    if n_parts is None:
        of_shuffles = int(str(rows.sparkSession.conf.get("spark.sql.shuffle.partitions")))
        n_parts = max(of_shuffles, math.ceil(n_rows / MOST_ROWS_PER_PART))
    texts = maybe_wanted(instances.select("instance_id", *columns), rows, n_rows)
    parted = rows.repartition(n_parts, "instance_id").hint("shuffle_hash")
    return texts.repartition(n_parts, "instance_id").join(parted, "instance_id")


def maybe_wanted(texts: "DataFrame", rows: "DataFrame", n_rows: int) -> "DataFrame":
    """The texts without most of those whose id no row has: by a Bloom filter of one hash, made and sent by Spark.

    The filter is a table of blocks of words of bits. (Spark makes one by itself only where the rows come of a scan with
    a filter, and the texts are more than 10 GB.)
    """
    from pyspark.sql import functions as F

    block_bits = _BITS_PER_WORD * _WORDS_PER_BLOCK
    n_bits = block_bits * max(1, math.ceil(n_rows * _BITS_PER_ID / block_bits))
    if n_bits > _MOST_BITS:
        return texts
    # Not the hash that parts are chosen by, nor one that a user may have chosen rows by.
    place = F.pmod(F.xxhash64("instance_id", F.lit("text filter")), F.lit(n_bits)).alias(_PLACE)
    of_rows = rows.select(place).selectExpr(f"{_PLACE} div {_BITS_PER_WORD} AS word", f"{_bit()} AS bits")
    of_none = rows.sparkSession.range(n_bits // _BITS_PER_WORD).selectExpr("id AS word", "0L AS bits")
    words = of_rows.union(of_none).groupBy("word").agg(F.bit_or("bits").alias("bits"))
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
    """The bit of a place in its word."""
    return f"shiftleft(1L, cast({_PLACE} % {_BITS_PER_WORD} AS int))"
