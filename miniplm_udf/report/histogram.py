"""Histograms as bucket counts that Spark computes. Driver only.

Inputs: a frame with a finite numeric column and a boolean `kept`. Outputs: 1,024 exact integer counts of kept and of
dropped rows over a range that a few outliers cannot stretch; rows outside the range are counted too. Two to seven
aggregations per column, no sort, and the same counts on every run, however the rows are partitioned.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

BUCKETS = 1024  # a figure shows sums of neighbouring buckets
_ZOOMS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """Rows kept and dropped in each of equal buckets over [low, high]; `n_below` and `n_above` count rows outside."""

    low: float
    high: float
    kept: list[int]
    dropped: list[int]
    n_below: int = 0
    n_above: int = 0

    def median(self) -> float:
        """The middle of the bucket that holds the middle row."""
        counts = [a + b for a, b in zip(self.kept, self.dropped, strict=True)]
        half, passed = (self.n_below + sum(counts) + self.n_above) / 2, self.n_below
        for bucket, count in enumerate(counts):
            passed += count
            if passed >= half:
                return self.low + (bucket + 0.5) * (self.high - self.low) / len(counts)
        return self.high

    def coarser(self, buckets: int) -> "Histogram":
        """Returns the histogram with fewer, wider buckets over the same range.

        Args:
            buckets: their number, which must divide the number of buckets.
        """
        step = len(self.kept) // buckets
        kept = [sum(self.kept[i : i + step]) for i in range(0, len(self.kept), step)]
        dropped = [sum(self.dropped[i : i + step]) for i in range(0, len(self.dropped), step)]
        return dataclasses.replace(self, kept=kept, dropped=dropped)


def histogram(frame: "DataFrame", column: str) -> Histogram:
    """Returns the exact counts of kept and dropped rows in 1,024 buckets of equal width.

    The range is [minimum, maximum], narrowed if outliers would squeeze the middle 99 % of the rows into a third.

    Args:
        frame: rows with the column and a boolean `kept`.
        column: a numeric column with finite values.
    """
    from pyspark.sql import functions as F

    least, most = frame.agg(F.min(column), F.max(column)).collect()[0]
    low, high = (float(least), float(most)) if least is not None else (0.0, 0.0)
    for _ in range(_ZOOMS):
        low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
        counted = _count_buckets(frame, column, low, high)
        first, last = _central(counted)
        if last - first + 1 >= BUCKETS // 3:
            break
        width, margin = (high - low) / BUCKETS, 0.15 * (last - first + 1)
        narrowed = max(low, low + (first - margin) * width), min(high, low + (last + 1 + margin) * width)
        if narrowed == (low, high):
            break
        low, high = narrowed
    return counted


def _count_buckets(frame: "DataFrame", column: str, low: float, high: float) -> Histogram:
    from pyspark.sql import functions as F

    value = F.col(column)
    inside = F.least(F.floor((value - F.lit(low)) / F.lit((high - low) / BUCKETS)), F.lit(BUCKETS - 1))
    bucket: Column = F.when(value < low, F.lit(-1)).when(value > high, F.lit(BUCKETS)).otherwise(inside)
    counts = {True: [0] * (BUCKETS + 2), False: [0] * (BUCKETS + 2)}
    for row in frame.groupBy(bucket.cast("int").alias("bucket"), "kept").count().collect():
        counts[row["kept"]][row["bucket"] + 1] = row["count"]
    kept, dropped = counts[True], counts[False]
    outside = {"n_below": kept[0] + dropped[0], "n_above": kept[-1] + dropped[-1]}
    return Histogram(low=low, high=high, kept=kept[1:-1], dropped=dropped[1:-1], **outside)


def _central(counted: Histogram) -> tuple[int, int]:
    """First and last bucket of the middle 99 % of all rows."""
    counts = [a + b for a, b in zip(counted.kept, counted.dropped, strict=True)]
    total = counted.n_below + sum(counts) + counted.n_above
    passed, first, last = counted.n_below, 0, len(counts) - 1
    for bucket, count in enumerate(counts):
        if passed <= 0.005 * total < passed + count:
            first = bucket
        if passed < 0.995 * total <= passed + count:
            last = bucket
        passed += count
    return first, max(first, last)
