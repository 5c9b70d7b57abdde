"""The exact cut of a ranking, without a global sort: which rows are the longest prefix that fits a budget.

Rows are ranked by score, highest first; ties by `instance_id`, ascending. Each row weighs 1 (selection by instances) or
its tokens. Input: a `Ranked` that answers with sums over ranges, and a budget. Output: a `Cut`, the last kept row.
Counts in buckets of the score find the one bucket that holds the cut; it is cut into buckets again until it is small
enough to sort here, or holds one score, which is then cut by the ids. Sums of integers and exact comparisons alone:
the result does not depend on how rows are partitioned. `find_cut` is pure; `RankedFrame` runs on a Spark driver.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, GroupedData

N_BUCKETS = 4096
# So many rows are sorted on the driver.
SMALL = 100_000
_PREFIX_STEP = 4


@dataclasses.dataclass(frozen=True)
class Cut:
    """The last kept row. Kept are rows of a higher score, and those of this score up to `instance_id` (None: all)."""

    score: float
    instance_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Rows with scores of `low` to `high`, both of which occur."""

    n_rows: int
    weight: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class IdGroup:
    """Rows of one score whose ids begin with `prefix`; `last_id` is the greatest."""

    n_rows: int
    weight: int
    prefix: str
    last_id: str


class Ranked(Protocol):
    """Rows to rank. Scores are finite; ids are unique."""

    def whole(self) -> Bucket | None:
        """All rows; None where there are none."""

    def buckets(self, bucket: Bucket, n_buckets: int) -> list[Bucket]:
        """The rows of a bucket in at most `n_buckets`, split where scores differ, in any order."""

    def rows(self, bucket: Bucket) -> list[tuple[float, str, int]]:
        """(score, instance_id, weight) of a bucket's rows, in any order."""

    def id_groups(self, score: float, prefix: str, n_characters: int) -> list[IdGroup]:
        """Rows of this very score whose id begins with `prefix`, by the first `n_characters` of the id."""


def budget_of(ratio: float, total: int) -> int:
    """floor(ratio * total), for the ratio as it is written: 0.29 of 100 is 29."""
    return math.floor(Fraction(str(ratio)) * total)


def n_fitting(weights: Iterable[int], budget: int) -> int:
    """Length of the longest prefix of non-negative weights with a sum of at most `budget`."""
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget, itertools.accumulate(weights)))


def find_cut(ranked: Ranked, budget: int, n_buckets: int = N_BUCKETS, small: int = SMALL) -> Cut | None:
    """The last row of the longest prefix, in rank order, whose weights sum to at most `budget`.

    Args:
        ranked: the rows; weights are not negative.
        budget: of weight.
        n_buckets: buckets of one pass, at least 2.
        small: a bucket of at most so many rows is fetched and sorted.

    Returns:
        None where not even the first row fits.
    """
    bucket, cut = ranked.whole(), None
    while bucket is not None:
        if bucket.weight <= budget:
            return Cut(bucket.low)
        if bucket.n_rows <= small:
            return _cut_in_rows(ranked.rows(bucket), budget) or cut
        if bucket.low == bucket.high:
            return _cut_in_ties(ranked, bucket.low, budget, small) or cut
        parts = sorted(ranked.buckets(bucket, n_buckets), key=lambda part: -part.high)
        fitting = n_fitting((part.weight for part in parts), budget)
        if fitting:
            cut = Cut(parts[fitting - 1].low)
        budget -= sum(part.weight for part in parts[:fitting])
        bucket = parts[fitting]
    return cut


def _cut_in_rows(rows: Sequence[tuple[float, str, int]], budget: int) -> Cut | None:
    ordered = sorted(rows, key=lambda row: (-row[0], row[1]))
    fitting = n_fitting((weight for _, _, weight in ordered), budget)
    return Cut(*ordered[fitting - 1][:2]) if fitting else None


def _cut_in_ties(ranked: Ranked, score: float, budget: int, small: int) -> Cut | None:
    """The cut among rows of one score, whose sum does not fit: by ever longer prefixes of their ids."""
    prefix, n_characters, cut = "", _PREFIX_STEP, None
    while True:
        groups = sorted(ranked.id_groups(score, prefix, n_characters), key=lambda group: group.prefix)
        fitting = n_fitting((group.weight for group in groups), budget)
        if fitting:
            cut = Cut(score, groups[fitting - 1].last_id)
        budget -= sum(group.weight for group in groups[:fitting])
        # A group of one row does not fit: the row above it is the last one.
        if groups[fitting].n_rows == 1:
            return cut
        # Few rows: one pass with whole ids, each a group of its own.
        n_characters = n_characters + _PREFIX_STEP if groups[fitting].n_rows > small else 1 << 30
        prefix = groups[fitting].prefix


def keep_condition(cut: Cut) -> "Column":
    """The rows that a cut keeps, as a condition on the columns score and instance_id."""
    from pyspark.sql import functions as F

    above, at = F.col("score") > F.lit(cut.score), F.col("score") == F.lit(cut.score)
    return above | (at if cut.instance_id is None else at & (F.col("instance_id") <= F.lit(cut.instance_id)))


class RankedFrame:
    """The rows of a Spark frame: instance_id string, score double (finite), weight bigint."""

    def __init__(self, frame: "DataFrame") -> None:
        self._frame = frame

    def whole(self) -> Bucket | None:
        found = self._summed(self._frame.groupBy())
        return found[0] if found else None

    def buckets(self, bucket: Bucket, n_buckets: int) -> list[Bucket]:
        from pyspark.sql import functions as F

        score, width = F.col("score"), bucket.high - bucket.low
        if math.isinf(width):
            number = F.when(score >= 0, 1).otherwise(0)
        else:
            share = (score - F.lit(bucket.low)) / F.lit(width)
            number = F.least(F.floor(share * F.lit(float(n_buckets))), F.lit(n_buckets - 1))
        return self._summed(self._within(bucket).groupBy(number.alias("number")))

    def rows(self, bucket: Bucket) -> list[tuple[float, str, int]]:
        return [tuple(row) for row in self._within(bucket).select("score", "instance_id", "weight").collect()]

    def id_groups(self, score: float, prefix: str, n_characters: int) -> list[IdGroup]:
        from pyspark.sql import functions as F

        found = (
            self._frame.where((F.col("score") == F.lit(score)) & F.col("instance_id").startswith(prefix))
            .groupBy(F.substring("instance_id", 1, n_characters).alias("prefix"))
            .agg(F.count("*"), F.sum("weight"), F.max("instance_id"))
        )
        return [IdGroup(n_rows, weight, prefix, last) for prefix, n_rows, weight, last in found.collect()]

    def _within(self, bucket: Bucket) -> "DataFrame":
        from pyspark.sql import functions as F

        return self._frame.where(F.col("score").between(F.lit(bucket.low), F.lit(bucket.high)))

    @staticmethod
    def _summed(grouped: "GroupedData") -> list[Bucket]:
        from pyspark.sql import functions as F

        sums = grouped.agg(
            F.count("*").alias("n"),
            F.sum("weight").alias("w"),
            F.min("score").alias("low"),
            F.max("score").alias("high"),
        )
        return [Bucket(row["n"], row["w"], row["low"], row["high"]) for row in sums.collect() if row["n"]]
