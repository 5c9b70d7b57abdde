"""The exact cut of a ranking without a global sort: the last row of the longest prefix that fits a budget.

Rows are ranked by score, highest first, and equal scores by `instance_id`, ascending; each group (all rows, or each
source) separately. A row weighs 1 (selection by instances) or its tokens. Input: a `Ranked`, which returns sums over
ranges, and a budget for each group. Output: for each group a `Cut`, its last kept row. The first pass counts all rows
in buckets of the score. Only the bucket that holds the cut is then counted by its scores (or in buckets again, while it
is large), and only rows with the score of the cut are divided by their ids. All groups share the passes. Only integers
are added and only exact values compared, so the partitioning of the rows does not matter. `find_cuts` is pure;
`RankedFrame` runs on the driver.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# The group of all rows, if sources are not ranked separately.
ALL = ""
N_BUCKETS = 4096
# At most this many scores, or ids, come to the driver.
SMALL = 100_000
# The bucket of candidates without a finite score: below all others, never kept.
UNUSABLE = -(1 << 31)
# Buckets per unit of the score, for all rows together (more would slow the pass by more than they save) and by source.
BUCKETS_PER_UNIT, BUCKETS_PER_UNIT_OF_A_SOURCE = 1024, 64
_EVEN_BELOW, _LARGEST = 64.0, 1e300
_WHOLE_ID = 1 << 30


@dataclasses.dataclass(frozen=True)
class Cut:
    """The last kept row of a group.

    Rows with a higher score are kept, and rows with this score whose id is at most `instance_id` (None: all of them).
    """

    score: float
    instance_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The rows of a group with scores from `low` to `high`, both of which occur: their number and their weight."""

    group: str
    n_rows: int
    weight: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class IdGroup:
    """The rows of a group with one score whose ids begin with `prefix`: number, weight and greatest id (`last_id`)."""

    group: str
    n_rows: int
    weight: int
    prefix: str
    last_id: str


class Ranked(Protocol):
    """Rows to rank, with unique ids. The returned lists are in any order."""

    def split(self, ranges: Mapping[str, Bucket], n_buckets: int) -> list[Bucket]:
        """Returns one bucket of each group, split into at most `n_buckets` buckets; equal scores stay together.

        Args:
            ranges: the bucket to split, by group; other groups have no bucket in the result.
            n_buckets: buckets of one group.
        """

    def scores(self, ranges: Mapping[str, Bucket]) -> list[Bucket]:
        """Returns one bucket of each group, split into one bucket for each score.

        Args:
            ranges: the bucket to split, by group; other groups have no bucket in the result.
        """

    def id_groups(self, ties: Mapping[str, tuple[float, str]], n_characters: int) -> list[IdGroup]:
        """Returns the rows with a given score and beginning of the id, grouped by the first `n_characters` of the id.

        Args:
            ties: (score, beginning of the id) by group.
            n_characters: length of the prefixes.
        """


def budget_of(ratio: float | Fraction, total: int) -> int:
    """Returns floor(ratio * total), with the ratio as a decimal number: 0.29 of 100 is 29.

    Args:
        ratio: the share that is kept.
        total: instances or tokens.

    Returns:
        The budget, in the unit of `total`.
    """
    return math.floor(Fraction(str(ratio)) * total)


def n_fitting(weights: Iterable[int], budget: int) -> int:
    """Returns the length of the longest prefix whose sum fits a budget.

    Args:
        weights: non-negative weights, in rank order.
        budget: the largest sum.
    """
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget, itertools.accumulate(weights)))


def find_cuts(
    ranked: Ranked, buckets: Sequence[Bucket], budgets: Mapping[str, int], n_buckets: int = N_BUCKETS,
    small: int = SMALL,
) -> dict[str, Cut]:  # fmt: skip
    """Finds, for each group, the last row of the longest prefix in rank order whose weight is at most the budget.

    Args:
        ranked: the rows; weights are not negative.
        buckets: all rows with a finite score, in buckets that do not overlap within a group.
        budgets: the largest total weight, by group; rows of other groups are ignored.
        n_buckets: buckets of one pass, at least 2.
        small: buckets with at most this many rows in total are counted by their scores, or by their ids.

    Returns:
        Cuts by group. A group is left out if not even its first row fits.
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


_Grouped = TypeVar("_Grouped", Bucket, IdGroup)


def _by_group(parts: Iterable[_Grouped]) -> Iterator[tuple[str, list[_Grouped]]]:
    ordered = sorted(parts, key=lambda part: part.group)
    return ((group, list(members)) for group, members in itertools.groupby(ordered, key=lambda part: part.group))


def _cuts_in_ties(ranked: Ranked, ties: Mapping[str, Bucket], left: dict[str, int], small: int) -> dict[str, Cut]:
    """The cuts among rows with equal scores that do not all fit: compares longer and longer prefixes of their ids."""
    cuts: dict[str, Cut] = {}
    boundary = [IdGroup(group, tie.n_rows, tie.weight, "", "") for group, tie in ties.items()]
    n_characters = 0
    # A single row that does not fit ends the search: the row above it is the last kept one.
    while opened := {part.group: part for part in boundary if part.n_rows > 1}:
        few = sum(part.n_rows for part in opened.values()) <= small
        n_characters = _WHOLE_ID if few else n_characters + (4 if len(opened) == 1 else 2)
        boundary = []
        prefixes = {group: (ties[group].low, part.prefix) for group, part in opened.items()}
        for group, parts in _by_group(ranked.id_groups(prefixes, n_characters)):
            parts.sort(key=lambda part: part.prefix)
            fitting = n_fitting((part.weight for part in parts), left[group])
            left[group] -= sum(part.weight for part in parts[:fitting])
            if fitting:
                cuts[group] = Cut(ties[group].low, parts[fitting - 1].last_id)
            boundary.append(parts[fitting])
    return cuts


def is_finite() -> "Column":
    """Whether the column `score` is a finite number: true or false, never null. Spark sorts NaN above infinity."""
    from pyspark.sql import functions as F

    return F.coalesce(F.abs("score") < F.lit(float("inf")), F.lit(False))


def score_bucket(score: "Column", buckets_per_unit: int) -> "Column":
    """The bucket of a finite score for one pass: a bigint, non-decreasing in the score, with the sign of the score.

    Buckets have equal width near 0; only scores far from 0 take the logarithm (80 ns a row).

    Args:
        score: the column.
        buckets_per_unit: a power of two.
    """
    from pyspark.sql import functions as F

    size, scale = F.abs(score), F.lit(float(buckets_per_unit))
    # Java's log1p is non-decreasing, and so are a sum with a constant and floor; the product is exact.
    far = (F.log1p(F.least(size, F.lit(_LARGEST)) - F.lit(_EVEN_BELOW)) + F.lit(_EVEN_BELOW)) * scale
    return F.when(size < _EVEN_BELOW, F.floor(score * scale)).otherwise(F.floor(F.when(score < 0, -far).otherwise(far)))


def keep_condition(cut: Cut) -> "Column":
    """Makes the condition for the rows that a cut keeps.

    Args:
        cut: the last kept row.

    Returns:
        A condition on the columns `score` and `instance_id`.
    """
    from pyspark.sql import functions as F

    above, at = F.col("score") > F.lit(cut.score), F.col("score") == F.lit(cut.score)
    return above | (at if cut.instance_id is None else at & (F.col("instance_id") <= F.lit(cut.instance_id)))


class RankedFrame:
    """The rows of a Spark frame, as a `Ranked`.

    Args:
        frame: `group` string, `instance_id` string, `score` double (null, NaN and infinite ones too), and `weight`
            bigint; without the column `weight`, each row weighs 1.
    """

    def __init__(self, frame: "DataFrame") -> None:
        from pyspark.sql import functions as F

        self._frame = frame
        self._weight = F.sum("weight") if "weight" in frame.columns else F.count("*")

    def tally(self, buckets_per_unit: int = BUCKETS_PER_UNIT) -> tuple[list[Bucket], dict[str, int]]:
        """Counts the rows in buckets of the score, in one pass that does not read the ids.

        Args:
            buckets_per_unit: buckets per unit of the score.

        Returns:
            The buckets of the rows with a finite score, and the weight of all rows by group.
        """
        from pyspark.sql import functions as F

        number = F.when(is_finite(), score_bucket(F.col("score"), buckets_per_unit)).otherwise(F.lit(UNUSABLE))
        buckets, totals = [], dict[str, int]()
        for row in self._sums(self._frame.withColumn("number", number), "number").collect():
            totals[row["group"]] = totals.get(row["group"], 0) + row["weight"]
            if row["number"] != UNUSABLE:
                buckets.append(_bucket(row))
        return buckets, totals

    def split(self, ranges: Mapping[str, Bucket], n_buckets: int) -> list[Bucket]:
        from pyspark.sql import functions as F

        rows = self._within({group: (bucket.low, bucket.high) for group, bucket in ranges.items()}, "double")
        # The scores of a bucket have one sign, so its width does not overflow.
        share = (F.col("score") - F.col("lower")) / (F.col("upper") - F.col("lower"))
        number = F.least(F.floor(share * F.lit(float(n_buckets))), F.lit(n_buckets - 1))
        numbered = rows.where("score between lower and upper").withColumn("number", number)
        return [_bucket(row) for row in self._sums(numbered, "number").collect()]

    def scores(self, ranges: Mapping[str, Bucket]) -> list[Bucket]:
        rows = self._within({group: (bucket.low, bucket.high) for group, bucket in ranges.items()}, "double")
        in_range = rows.where("score between lower and upper")
        return [_bucket(row) for row in self._sums(in_range, "score").collect()]

    def id_groups(self, ties: Mapping[str, tuple[float, str]], n_characters: int) -> list[IdGroup]:
        from pyspark.sql import functions as F

        rows = self._within(ties, "string")
        groups = (
            rows.where((F.col("score") == F.col("lower")) & F.col("instance_id").startswith(F.col("upper")))
            .groupBy("group", F.substring("instance_id", 1, n_characters).alias("prefix"))
            .agg(F.count("*").alias("n"), self._weight.alias("weight"), F.max("instance_id").alias("last"))
        )
        return [
            IdGroup(row["group"], row["n"], row["weight"], row["prefix"], row["last"])
            for row in groups.select("group", "n", "weight", "prefix", "last").collect()
        ]

    def _within(self, ranges: Mapping[str, tuple[float, float | str]], upper: str) -> "DataFrame":
        """The rows of the given groups, with the two values of their group as `lower` and `upper` (type `upper`)."""
        from pyspark.sql import functions as F

        if len(ranges) == 1:
            ((group, (lower, value)),) = ranges.items()
            rows = self._frame.where(F.col("group") == F.lit(group))
            return rows.withColumns({"lower": F.lit(lower).cast("double"), "upper": F.lit(value).cast(upper)})
        spark = self._frame.sparkSession
        values = [(group, lower, value) for group, (lower, value) in ranges.items()]
        return self._frame.join(
            F.broadcast(spark.createDataFrame(values, f"group string, lower double, upper {upper}")), "group"
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
