"""Fingerprints of the rows of a corpus: the same for the same ids and scores, in any order and any partitioning.

    instance_id, score -> 64-bit hash of a row -> exclusive or and sum over the rows -> text of the two and the count

Sums of two sets of rows can be added, so a corpus that grows needs no second pass over its old rows. Spark computes the
hashes and sums; the driver puts the text together.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column


def row_hash() -> "Column":
    """The hash of a row that fingerprints are made of: a bigint over instance_id and score."""
    from pyspark.sql import functions as F

    return F.xxhash64("instance_id", "score")


def sums_of(keep: "Column") -> list["Column"]:
    """Makes the aggregates from which a version's counts and fingerprint are computed.

    Args:
        keep: a condition; only rows for which it is true count. The rows have instance_id, score and n_tokens.

    Returns:
        Columns `n_kept`, `n_tokens`, `threshold` (the lowest score), and `xor` and `sum` of the rows' hashes.
    """
    from pyspark.sql import functions as F

    hashed = row_hash()
    low_bits = hashed.bitwiseAND(F.lit(0xFFFFFFFF).cast("bigint"))
    return [
        F.count_if(keep).alias("n_kept"),
        F.sum(F.when(keep, F.col("n_tokens"))).alias("n_tokens"),
        F.min(F.when(keep, F.col("score"))).alias("threshold"),
        F.bit_xor(F.when(keep, hashed)).alias("xor"),
        F.sum(F.when(keep, low_bits)).alias("sum"),
    ]


def parts_of(fingerprint: str) -> tuple[int, int]:
    """Takes the two parts out of a fingerprint.

    Args:
        fingerprint: the result of `fingerprint_of`.

    Returns:
        The exclusive or and the sum of the rows' hashes, as `fingerprint_of` takes them.
    """
    return int(fingerprint[:16], 16), int(fingerprint[16:32], 16)


def fingerprint_of(parts: list[tuple[int, int]], n_rows: int) -> str:
    """The fingerprint of rows: exclusive or, sum and number of their hashes, equal for any order and grouping.

    Args:
        parts: exclusive or and sum of the hashes, one pair for each group of rows.
        n_rows: rows in all groups.
    """
    xor, total = 0, 0
    for part_xor, part_sum in parts:
        xor, total = xor ^ (part_xor & 0xFFFFFFFFFFFFFFFF), total + part_sum
    return f"{xor:016x}{total & 0xFFFFFFFFFFFFFFFF:016x}-{n_rows}"
