"""Copies and near-copies: which instance of the same, or nearly the same, text came first. Joins of Spark; driver only.

    content_hash -> duplicate_of
    shingles -> buckets -> pairs -> their Jaccard similarity -> near_duplicate_of

Instances are ordered by when they were ingested, then by id, and each is held against those before it alone: so what an
earlier run has said of an instance stays true, whatever comes. Of a bucket's instances each is paired with the first
and with the one just before it, so the work grows with the rows, not with the square of what is copied often. A pair
counts by the similarity of its whole texts, not by that of its signatures: chance may lose a pair, never make one.
(Spark ML's MinHashLSH makes a bucket of a single minimum, which most texts of a language share by chance, and joins all
pairs in one.)
"""

from typing import TYPE_CHECKING

from miniplm_udf.annotations.words import WORDS, ngram_hashes, with_words
from miniplm_udf.config_annotate import NearDuplicatesConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame

BUCKETS = "minhash_buckets"
_ORDER = ("ingested_at", "instance_id")


def with_duplicates(rows: "DataFrame", pool: "DataFrame") -> "DataFrame":
    """The rows with `duplicate_of`: the first instance of the same text, null where that is the row itself.

    Args:
        rows: with instance_id and content_hash.
        pool: all instances, with ingested_at too.
    """
    from pyspark.sql import functions as F

    wanted = rows.select("content_hash").distinct()
    first = (
        pool.join(wanted, "content_hash", "left_semi")
        .groupBy("content_hash")
        .agg(F.min(F.struct(*_ORDER)).getField("instance_id").alias("duplicate_of"))
    )
    found = F.nullif(F.col("duplicate_of"), F.col("instance_id"))
    return rows.join(first, "content_hash").withColumn("duplicate_of", found)


def shingles(size: int) -> "Column":
    """Hashes of `size` words in a row of the column `WORDS`; one of all words where there are fewer."""
    from pyspark.sql import functions as F

    found = F.col(WORDS)
    short = (F.size(found) > 0) & (F.size(found) < size)
    return F.when(short, F.array(F.xxhash64(found))).otherwise(ngram_hashes(found, size))


def with_buckets(rows: "DataFrame", config: NearDuplicatesConfig) -> "DataFrame":
    """The rows with the buckets of their texts; none for a text without words."""
    from pyspark.sql.functions import ArrowUDFType, arrow_udf
    from pyspark.sql.types import ArrayType, LongType

    threshold = config.threshold

    def run(found: "pa.Array") -> "pa.Array":
        return _buckets_arrow(found, threshold)

    buckets = arrow_udf(run, ArrayType(LongType(), False), ArrowUDFType.SCALAR)
    return with_words(rows).withColumn(BUCKETS, buckets(shingles(config.shingle_words))).drop(WORDS)


def _buckets_arrow(found: "pa.Array", threshold: float) -> "pa.Array":
    import numpy as np
    import pyarrow as pa

    from miniplm_udf.annotations import minhash

    values = found.flatten().to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
    lengths = found.value_lengths().to_numpy(zero_copy_only=False)
    places = zip(np.cumsum(lengths) - lengths, lengths, strict=True)
    of_sets = [minhash.buckets(values[start : start + n], threshold) if n else [] for start, n in places]
    return pa.array(of_sets, pa.list_(pa.int64()))


def pairs(new: "DataFrame", old: "DataFrame | None") -> "DataFrame":
    """Who may be a near-duplicate of whom: new rows, and those before them in a bucket that are first there, or next.

    Args:
        new, old: instance_id, ingested_at and their buckets; old ones are looked at, not judged.

    Returns:
        instance_id, other.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    def exploded(rows: "DataFrame", is_new: bool) -> "DataFrame":
        return rows.select(*_ORDER, F.lit(is_new).alias("is_new"), F.explode(BUCKETS).alias("bucket"))

    rows = exploded(new, True)
    if old is not None:
        in_use = rows.select("bucket").distinct()
        rows = rows.union(exploded(old, False).join(in_use, "bucket", "left_semi").select(rows.columns))
    order = Window.partitionBy("bucket").orderBy(*_ORDER)
    before = F.array(F.first("instance_id").over(order), F.lag("instance_id").over(order))
    found = rows.withColumn("before", before).where("is_new")
    return found.select("instance_id", F.explode("before").alias("other")).where("other != instance_id").distinct()


def shingled(pairs: "DataFrame", pool: "DataFrame", config: NearDuplicatesConfig) -> "DataFrame":
    """The instances of the pairs, each with its set of shingles.

    Args:
        pool: all instances, with their texts.
    """
    from pyspark.sql import functions as F

    wanted = pairs.select(F.explode(F.array("instance_id", "other")).alias("instance_id")).distinct()
    found = F.array_distinct(shingles(config.shingle_words)).alias("shingles")
    return with_words(pool.join(wanted, "instance_id", "left_semi")).select(*_ORDER, found)


def nearest(pairs: "DataFrame", shingled: "DataFrame", threshold: float) -> "DataFrame":
    """Of the pairs that are as similar as the threshold, each instance's first, and how similar it is.

    Returns:
        instance_id, near_duplicate_of, near_duplicate_jaccard.
    """
    from pyspark.sql import functions as F

    own = shingled.select("instance_id", F.col("shingles").alias("of_one"))
    others = shingled.select(
        F.col("instance_id").alias("other"), F.col("ingested_at").alias("other_at"), F.col("shingles").alias("of_other")
    )
    shared = F.size(F.array_intersect("of_one", "of_other"))
    jaccard = shared / (F.size("of_one") + F.size("of_other") - shared)
    near = pairs.join(own, "instance_id").join(others, "other").withColumn("jaccard", jaccard)
    first = F.min(F.struct("other_at", "other", "jaccard")).alias("first")
    return (
        near.where(F.col("jaccard") >= threshold)
        .groupBy("instance_id")
        .agg(first)
        .select(
            "instance_id",
            F.col("first.other").alias("near_duplicate_of"),
            F.col("first.jaccard").alias("near_duplicate_jaccard"),
        )
    )
