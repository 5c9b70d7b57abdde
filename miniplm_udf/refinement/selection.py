"""The exact cut of a ranking, without a global sort: which rows are the longest prefix that fits a budget.

Rows are ranked by score, highest first; ties by `instance_id`, ascending; each group (all rows, or each source) by
itself. A row weighs 1 (selection by instances) or its tokens. Input: a `Ranked` that answers with sums over ranges, and
a budget a group. Output: a `Cut` a group, the last kept row. One pass counts all rows in buckets of the score, a fixed
function; the one bucket that holds the cut is counted by its scores (or, while it is large, in buckets again), and
only rows of one score are cut by their ids. All groups go through the same passes. Sums of integers and exact
comparisons alone: how rows are partitioned does not matter. `find_cuts` is pure; `RankedFrame` runs on a driver.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# The group that all rows are in where sources are not ranked by themselves.
ALL = ""
N_BUCKETS = 4096
# So many scores, or ids, come to the driver.
SMALL = 100_000
# Candidates without a finite score: below all others, never kept.
UNUSABLE = -(1 << 31)
# Buckets a unit of the score: of all rows together (with more, a pass is slower than what it saves); of many sources.
BUCKETS_PER_UNIT, BUCKETS_PER_UNIT_OF_A_SOURCE = 1024, 64
_EVEN_BELOW, _LARGEST = 64.0, 1e300
_WHOLE_ID = 1 << 30


@dataclasses.dataclass(frozen=True)
class Cut:
    """The last kept row. Kept are rows of a higher score, and those of this score up to `instance_id` (None: all)."""

    score: float
    instance_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Rows of a group with scores of `low` to `high`, both of which occur."""

    group: str
    n_rows: int
    weight: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class IdGroup:
    """Rows of a group and of one score whose ids begin with `prefix`; `last_id` is the greatest."""

    group: str
    n_rows: int
    weight: int
    prefix: str
    last_id: str


class Ranked(Protocol):
    """Rows to rank. Ids are unique. Answers are in any order."""

    def split(self, ranges: Mapping[str, Bucket], n_buckets: int) -> list[Bucket]:
        """Of each group the rows of a bucket, in at most `n_buckets`, split where scores differ."""

    def scores(self, ranges: Mapping[str, Bucket]) -> list[Bucket]:
        """Of each group the rows of a bucket, one bucket a score."""

    def id_groups(self, ties: Mapping[str, tuple[float, str]], n_characters: int) -> list[IdGroup]:
        """Of each group the rows of this very score whose id begins with this, by the first characters of the id."""


def budget_of(ratio: float | Fraction, total: int) -> int:
    """floor(ratio * total), for the ratio as it is written: 0.29 of 100 is 29."""
    return math.floor(Fraction(str(ratio)) * total)


def n_fitting(weights: Iterable[int], budget: int) -> int:
    """Length of the longest prefix of non-negative weights with a sum of at most `budget`."""
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget, itertools.accumulate(weights)))


def find_cuts(
    ranked: Ranked, buckets: Sequence[Bucket], budgets: Mapping[str, int], n_buckets: int = N_BUCKETS,
    small: int = SMALL,
) -> dict[str, Cut]:  # fmt: skip
    """Of each group the last row of the longest prefix, in rank order, whose weights sum to at most its budget.

    Args:
        ranked: the rows; weights are not negative.
        buckets: all rows with a finite score, in buckets that do not overlap within a group.
        budgets: of weight, by group; rows of other groups are left out.
        n_buckets: buckets of one pass, at least 2.
        small: buckets of at most so many rows together are counted by their scores, or by their ids.

    Returns:
        By group; without those of which not even the first row fits.
    """
    cuts: dict[str, Cut] = {}
    left, ties = dict(budgets), dict[str, Bucket]()
    buckets = [bucket for bucket in buckets if bucket.group in budgets]
    while buckets:
        wide: dict[str, Bucket] = {}
        for group, parts in _by_group(buckets):
            parts.sort(key=lambda part: -part.high)
            fitting = n_fitting((part.weight for part in parts), left[group])
            left[group] -= sum(part.weight for part in parts[:fitting])
            if fitting:
                cuts[group] = Cut(parts[fitting - 1].low)
            if fitting < len(parts):
                first = parts[fitting]
                (ties if first.low == first.high else wide)[group] = first
        few = sum(bucket.n_rows for bucket in wide.values()) <= small
        buckets = (ranked.scores(wide) if few else ranked.split(wide, n_buckets)) if wide else []
    return cuts | _cuts_in_ties(ranked, ties, left, small)


_Part = TypeVar("_Part", Bucket, IdGroup)


def _by_group(parts: Iterable[_Part]) -> Iterator[tuple[str, list[_Part]]]:
    ordered = sorted(parts, key=lambda part: part.group)
    return ((group, list(of)) for group, of in itertools.groupby(ordered, key=lambda part: part.group))


def _cuts_in_ties(ranked: Ranked, ties: Mapping[str, Bucket], left: dict[str, int], small: int) -> dict[str, Cut]:
    """The cuts among rows of one score, whose sum does not fit: by ever longer prefixes of their ids."""
    cuts: dict[str, Cut] = {}
    found = [IdGroup(group, tie.n_rows, tie.weight, "", "") for group, tie in ties.items()]
    n_characters = 0
    # A group of one row does not fit: the row above it is the last one.
    while opened := {part.group: part for part in found if part.n_rows > 1}:
        few = sum(part.n_rows for part in opened.values()) <= small
        n_characters = _WHOLE_ID if few else n_characters + (4 if len(opened) == 1 else 2)
        found = []
        places = {group: (ties[group].low, part.prefix) for group, part in opened.items()}
        for group, parts in _by_group(ranked.id_groups(places, n_characters)):
            parts.sort(key=lambda part: part.prefix)
            fitting = n_fitting((part.weight for part in parts), left[group])
            left[group] -= sum(part.weight for part in parts[:fitting])
            if fitting:
                cuts[group] = Cut(ties[group].low, parts[fitting - 1].last_id)
            found.append(parts[fitting])
    return cuts


def is_finite() -> "Column":
    """Whether the column `score` is a number: true or false. NaN is above infinity to Spark."""
    from pyspark.sql import functions as F

    return F.coalesce(F.abs("score") < F.lit(float("inf")), F.lit(False))


def quick_number(score: "Column", buckets_per_unit: int) -> "Column":
    """A bigint that never falls as the (finite) score rises, and that is negative where the score is.

    Even buckets, and the logarithm (80 ns a row) far from 0 alone. `buckets_per_unit` is a power of two.
    """
    from pyspark.sql import functions as F

    size, scale = F.abs(score), F.lit(float(buckets_per_unit))
    # Java's log1p never falls, nor do a sum with a constant and floor; the product is exact.
    far = (F.log1p(F.least(size, F.lit(_LARGEST)) - F.lit(_EVEN_BELOW)) + F.lit(_EVEN_BELOW)) * scale
    return F.when(size < _EVEN_BELOW, F.floor(score * scale)).otherwise(F.floor(F.when(score < 0, -far).otherwise(far)))


def keep_condition(cut: Cut) -> "Column":
    """The rows that a cut keeps, as a condition on the columns score and instance_id."""
    from pyspark.sql import functions as F

    above, at = F.col("score") > F.lit(cut.score), F.col("score") == F.lit(cut.score)
    return above | (at if cut.instance_id is None else at & (F.col("instance_id") <= F.lit(cut.instance_id)))


class RankedFrame:
    """The rows of a Spark frame: group string, instance_id string, score double (of any kind); weight bigint, or 1."""

    def __init__(self, frame: "DataFrame") -> None:
        from pyspark.sql import functions as F

        self._frame = frame
        self._weight = F.sum("weight") if "weight" in frame.columns else F.count("*")

    def tally(self, buckets_per_unit: int = BUCKETS_PER_UNIT) -> tuple[list[Bucket], dict[str, int]]:
        """All rows with a finite score in buckets; and the weight of all rows, by group. One pass, without the ids."""
        from pyspark.sql import functions as F

        number = F.when(is_finite(), quick_number(F.col("score"), buckets_per_unit)).otherwise(F.lit(UNUSABLE))
        buckets, totals = [], dict[str, int]()
        for row in self._sums(self._frame.withColumn("number", number), "number").collect():
            totals[row["group"]] = totals.get(row["group"], 0) + row["weight"]
            if row["number"] != UNUSABLE:
                buckets.append(_bucket(row))
        return buckets, totals

    def split(self, ranges: Mapping[str, Bucket], n_buckets: int) -> list[Bucket]:
        from pyspark.sql import functions as F

        rows = self._within({group: (bucket.low, bucket.high) for group, bucket in ranges.items()}, "double")
        # Scores of a bucket have one sign, so the width is a number.
        share = (F.col("score") - F.col("lower")) / (F.col("upper") - F.col("lower"))
        number = F.least(F.floor(share * F.lit(float(n_buckets))), F.lit(n_buckets - 1))
        found = rows.where("score between lower and upper").withColumn("number", number)
        return [_bucket(row) for row in self._sums(found, "number").collect()]

    def scores(self, ranges: Mapping[str, Bucket]) -> list[Bucket]:
        rows = self._within({group: (bucket.low, bucket.high) for group, bucket in ranges.items()}, "double")
        found = rows.where("score between lower and upper")
        return [_bucket(row) for row in self._sums(found, "score").collect()]

    def id_groups(self, ties: Mapping[str, tuple[float, str]], n_characters: int) -> list[IdGroup]:
        from pyspark.sql import functions as F

        rows = self._within(ties, "string")
        found = (
            rows.where((F.col("score") == F.col("lower")) & F.col("instance_id").startswith(F.col("upper")))
            .groupBy("group", F.substring("instance_id", 1, n_characters).alias("prefix"))
            .agg(F.count("*").alias("n"), self._weight.alias("weight"), F.max("instance_id").alias("last"))
        )
        return [
            IdGroup(row["group"], row["n"], row["weight"], row["prefix"], row["last"])
            for row in found.select("group", "n", "weight", "prefix", "last").collect()
        ]

    def _within(self, places: Mapping[str, tuple[float, float | str]], upper: str) -> "DataFrame":
        """The rows of these groups, with the two values of each as `lower` and `upper` (of the type `upper`)."""
        from pyspark.sql import functions as F

        if len(places) == 1:
            ((group, (lower, value)),) = places.items()
            rows = self._frame.where(F.col("group") == F.lit(group))
            return rows.withColumns({"lower": F.lit(lower).cast("double"), "upper": F.lit(value).cast(upper)})
        spark = self._frame.sparkSession
        known = [(group, lower, value) for group, (lower, value) in places.items()]
        return self._frame.join(
            F.broadcast(spark.createDataFrame(known, f"group string, lower double, upper {upper}")), "group"
        )

    def _sums(self, frame: "DataFrame", by: str) -> "DataFrame":
        from pyspark.sql import functions as F

        return frame.groupBy("group", by).agg(
            F.count("*").alias("n"),
            self._weight.alias("weight"),
            F.min("score").alias("low"),
            F.max("score").alias("high"),
        )


def _bucket(row: Mapping[str, object]) -> Bucket:
    return Bucket(*(row[name] for name in ("group", "n", "weight", "low", "high")))  # type: ignore[arg-type]
