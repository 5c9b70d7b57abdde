"""Copies and near-copies: which instance of the same, or nearly the same, text came first. Spark joins; driver only.

    content_hash -> duplicate_of
    shingles -> buckets -> pairs -> their Jaccard similarity -> near_duplicate_of

Instances are ordered by the time of their ingestion, then by id. Each is compared only with earlier instances, so the
results of an earlier run stay true whatever is ingested later. In a bucket, each instance is paired with the first one
and with the preceding one, so the work grows with the rows and not with the square of the copies. A pair counts by
the Jaccard similarity of the whole texts, not of their signatures: chance may lose a pair, but never make one. (Spark
ML's MinHashLSH makes a bucket from a single minimum, which most texts of a language share by chance, and joins all
pairs within a bucket.)
"""

from typing import TYPE_CHECKING

from miniplm_udf.annotations.words import WORDS, ngram_hashes, with_words
from miniplm_udf.config.annotate import NearDuplicatesConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame

BUCKETS = "minhash_buckets"
_ORDER = ("ingested_at", "instance_id")


def with_duplicates(rows: "DataFrame", pool: "DataFrame") -> "DataFrame":
    """Returns the rows with `duplicate_of`: the id of the first instance with the same text; null for the first itself.

    Args:
        rows: a frame with instance_id and content_hash.
        pool: all instances, also with ingested_at.
    """
    from pyspark.sql import functions as F

    wanted = rows.select("content_hash").distinct()
    first = (
        pool.join(wanted, "content_hash", "left_semi")
        .groupBy("content_hash")
        .agg(F.min(F.struct(*_ORDER)).getField("instance_id").alias("duplicate_of"))
    )
    original = F.nullif(F.col("duplicate_of"), F.col("instance_id"))
    return rows.join(first, "content_hash").withColumn("duplicate_of", original)


def shingles(size: int) -> "Column":
    """Makes the column of a text's shingles, array<bigint>, from the column `WORDS`.

    Args:
        size: words of a shingle.

    Returns:
        Hashes of every `size` consecutive words; for a shorter text, one hash of all its words.
    """
    from pyspark.sql import functions as F

    words = F.col(WORDS)
    is_short = (F.size(words) > 0) & (F.size(words) < size)
    return F.when(is_short, F.array(F.xxhash64(words))).otherwise(ngram_hashes(words, size))


def with_buckets(rows: "DataFrame", config: NearDuplicatesConfig) -> "DataFrame":
    """Returns the rows with the buckets of their texts (`BUCKETS`, array<bigint>); a text without words has none.

    Args:
        rows: a frame with `text`.
        config: words of a shingle, and the similarity that two near-duplicates have at least.
    """
    from pyspark.sql.functions import ArrowUDFType, arrow_udf
    from pyspark.sql.types import ArrayType, LongType

    threshold = config.threshold

    def run(shingle_hashes: "pa.Array") -> "pa.Array":
        return _buckets_arrow(shingle_hashes, threshold)

    buckets = arrow_udf(run, ArrayType(LongType(), False), ArrowUDFType.SCALAR)
    return with_words(rows).withColumn(BUCKETS, buckets(shingles(config.shingle_words))).drop(WORDS)


def _buckets_arrow(shingle_hashes: "pa.Array", threshold: float) -> "pa.Array":
    import numpy as np
    import pyarrow as pa

    from miniplm_udf.annotations import minhash

    values = shingle_hashes.flatten().to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
    lengths = shingle_hashes.value_lengths().to_numpy(zero_copy_only=False)
    spans = zip(np.cumsum(lengths) - lengths, lengths, strict=True)
    buckets = [minhash.buckets(values[start : start + n], threshold) if n else [] for start, n in spans]
    return pa.array(buckets, pa.list_(pa.int64()))


def pairs(new: "DataFrame", old: "DataFrame | None") -> "DataFrame":
    """Pairs of possible near-duplicates: a new instance, and the first or the preceding instance in one of its buckets.

    Args:
        new: instance_id, ingested_at and the buckets of the instances to annotate.
        old: the same of instances that are annotated already; None: there are none.

    Returns:
        instance_id (new), other (earlier); distinct.
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
    paired = rows.withColumn("before", before).where("is_new")
    return paired.select("instance_id", F.explode("before").alias("other")).where("other != instance_id").distinct()


def shingle_sets(pairs: "DataFrame", pool: "DataFrame", config: NearDuplicatesConfig) -> "DataFrame":
    """The sets of shingles of all instances in the pairs.

    Args:
        pairs: the result of `pairs`.
        pool: all instances, with their texts.
        config: the words of a shingle.

    Returns:
        ingested_at, instance_id, shingles (array<bigint>, distinct).
    """
    from pyspark.sql import functions as F

    wanted = pairs.select(F.explode(F.array("instance_id", "other")).alias("instance_id")).distinct()
    distinct = F.array_distinct(shingles(config.shingle_words)).alias("shingles")
    return with_words(pool.join(wanted, "instance_id", "left_semi")).select(*_ORDER, distinct)


def nearest(pairs: "DataFrame", sets: "DataFrame", threshold: float) -> "DataFrame":
    """For each instance, the earliest instance that is at least as similar as the threshold.

    Args:
        pairs: the result of `pairs`.
        sets: the result of `shingle_sets`.
        threshold: Jaccard similarity, above 0 and at most 1.

    Returns:
        instance_id, near_duplicate_of, near_duplicate_jaccard (double).
    """
    from pyspark.sql import functions as F

    own = sets.select("instance_id", F.col("shingles").alias("own_shingles"))
    others = sets.select(
        F.col("instance_id").alias("other"),
        F.col("ingested_at").alias("other_at"),
        F.col("shingles").alias("other_shingles"),
    )
    shared = F.size(F.array_intersect("own_shingles", "other_shingles"))
    jaccard = shared / (F.size("own_shingles") + F.size("other_shingles") - shared)
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
