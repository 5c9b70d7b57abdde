"""Running counts of a followed corpus's candidates, by bucket of the score, in Delta; and the cut that they give.

    score -> bucket (a fixed, non-decreasing integer function) -> candidates and tokens by bucket -> bucket of the cut

The counts are sums over the first micro-batches of the matrix; new micro-batches are added, and none is read again.
`cuts/<name>` holds only the newest counts, at most some ten thousand rows; each commit replaces them, with the chosen
cut as `userMetadata`. The counts are exact; the cut falls between two buckets, so its rank is wrong by at most the rows
of the bucket that holds the exact cut. A replay finds that its micro-batch is counted already. Driver only.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config.refine import SelectConfig
from miniplm_udf.refinement.selection import UNUSABLE, budget_of, n_fitting
from miniplm_udf.store import corpus_records, tables

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# A bucket is a thousandth of its scores wide, or a millionth near 0.
BUCKETS_PER_E = 1024
_UNITS, _LARGEST = 1000.0, 1e300
# (rows, tokens) by bucket.
BucketCounts = Mapping[int, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class BucketCut:
    """A cut between two buckets.

    Attributes:
        bucket: the lowest kept bucket.
        score: its lower edge; for a threshold rule, the threshold.
        budget: what the rule allows, in instances or tokens; None for a threshold.
        n_within: what the kept buckets hold, in the same unit.
        boundary_rows: rows of the bucket that holds the exact cut: the largest possible error of the rank.
    """

    bucket: int
    score: float
    budget: int | None
    n_within: int
    boundary_rows: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """Counts of the candidates of one corpus config.

    Attributes:
        config: fingerprint of the corpus config.
        query_id: query id of the matrix's rows.
        through: the newest counted micro-batch of the matrix; -1: none is counted.
        counts: (rows, tokens) by bucket.
        on: the state of `cuts/<name>` that the counts were read from; None: there is no table.
    """

    config: str
    query_id: str
    through: int
    counts: BucketCounts
    on: corpus_records.Newest | None = None

    def plus(self, counts: BucketCounts, through: int) -> "Counted":
        """Returns the sum of these counts and the counts of further micro-batches.

        Args:
            counts: (rows, tokens) by bucket of the further micro-batches.
            through: the newest of these micro-batches.
        """
        return dataclasses.replace(self, counts=merged(self.counts, counts), through=through)


def bucket_number(score: "Column") -> "Column":
    """The bucket of a finite score: a bigint, non-decreasing in the score, with the sign of the score.

    `lower_edge` is its inverse. Stored counts depend on this function, so it stays as it is; `selection.score_bucket`
    is faster, and serves single passes whose counts are not stored.

    Args:
        score: a column of doubles.
    """
    from pyspark.sql import functions as F

    # Java's log1p is non-decreasing, and so are a product with a positive constant and floor.
    size = F.log1p(F.least(F.abs(score), F.lit(_LARGEST)) * F.lit(_UNITS)) * F.lit(float(BUCKETS_PER_E))
    return F.floor(F.when(score < 0, -size).otherwise(size))


def lower_edge(bucket: int) -> float:
    """The score at which a bucket begins.

    Args:
        bucket: the result of `bucket_number`.
    """
    return math.copysign(math.expm1(abs(bucket) / BUCKETS_PER_E) / _UNITS, bucket)


def bucket_column(select: SelectConfig, usable: "Column") -> "Column":
    """The bucket of a row, a bigint, from its column `score`.

    Args:
        select: the selection; for a threshold rule, bucket 1 holds the scores from the threshold on, and 0 the others.
        usable: whether the score is finite; rows with another score get the bucket `UNUSABLE`.
    """
    from pyspark.sql import functions as F

    score = F.col("score")
    if select.rule == "threshold":
        bucket = F.when(score >= F.lit(float(select.threshold or 0)), F.lit(1)).otherwise(F.lit(0)).cast("bigint")
    else:
        bucket = bucket_number(score)
    return F.when(usable, bucket).otherwise(F.lit(UNUSABLE).cast("bigint"))


def merged(counts: BucketCounts, more: BucketCounts) -> BucketCounts:
    """Adds two counts, bucket by bucket.

    Args:
        counts: (rows, tokens) by bucket.
        more: (rows, tokens) by bucket.

    Returns:
        The sums, for every bucket that either has.
    """
    all_buckets = {bucket: counts.get(bucket, (0, 0)) for bucket in counts.keys() | more.keys()}
    return {
        bucket: (n_rows + more.get(bucket, (0, 0))[0], n_tokens + more.get(bucket, (0, 0))[1])
        for bucket, (n_rows, n_tokens) in all_buckets.items()
    }


def totals(counts: BucketCounts) -> tuple[int, int]:
    """Adds up the counts of all buckets, `UNUSABLE` included.

    Args:
        counts: (rows, tokens) by bucket.

    Returns:
        Candidates, and their tokens.
    """
    return sum(n_rows for n_rows, _ in counts.values()), sum(n_tokens for _, n_tokens in counts.values())


def cut_of(counts: BucketCounts, select: SelectConfig) -> BucketCut:
    """Finds the cut that a rule gives. The bucket with the exact cut is kept if more than half of it fits the budget.

    Args:
        counts: (rows, tokens) by bucket, as `bucket_column` numbers the buckets.
        select: the rule: a threshold, or a ratio of all candidates or of their tokens.

    Returns:
        The cut. If no bucket fits the budget, it is above the highest bucket, so that nothing is kept.
    """
    by_tokens = select.rule != "threshold" and select.by == "tokens"
    ordered = sorted(((bucket, *sums) for bucket, sums in counts.items() if bucket != UNUSABLE), reverse=True)
    weights = [n_tokens if by_tokens else n_rows for _, n_rows, n_tokens in ordered]
    if select.rule == "threshold":
        assert select.threshold is not None
        return BucketCut(1, float(select.threshold), None, counts.get(1, (0, 0))[0], 0)
    assert select.ratio is not None
    budget = budget_of(select.ratio, totals(counts)[by_tokens])
    n_kept = n_fitting(weights, budget)
    within, boundary_rows = sum(weights[:n_kept]), 0
    if n_kept < len(ordered):
        boundary_rows = ordered[n_kept][1]
        if 2 * (budget - within) > weights[n_kept]:
            within, n_kept = within + weights[n_kept], n_kept + 1
    # If no bucket fits, the cut is above the highest bucket. Without candidates, any cut will do.
    lowest = ordered[n_kept - 1][0] if n_kept else ordered[0][0] + 1 if ordered else 0
    return BucketCut(lowest, lower_edge(lowest), budget, within, boundary_rows)


def read_counts(spark: "SparkSession", uri: str, config: str, query_id: str) -> Counted:
    """Reads the counts of a followed corpus.

    Args:
        spark: any session.
        uri: URI of `cuts/<name>`.
        config: fingerprint of the corpus config.
        query_id: query id of the matrix's rows.

    Returns:
        The counts; empty if there is no table, or its counts belong to another config or matrix.
    """
    empty = Counted(config, query_id, -1, {}, corpus_records.newest(uri))
    if empty.on is None:
        return empty
    rows = tables.read(spark, uri, empty.on.base).collect()
    if not rows or (rows[0]["config"], rows[0]["query_id"]) != (config, query_id):
        return empty
    return empty.plus({row["bucket"]: (row["n_rows"], row["n_tokens"]) for row in rows}, rows[0]["batch_id"])


def write_counts(spark: "SparkSession", uri: str, name: str, counted: Counted, cut: BucketCut) -> None:
    """Replaces the counts of a followed corpus.

    Args:
        spark: any session.
        uri: URI of `cuts/<name>`.
        name: name of the corpus.
        counted: the new counts, with the state that they were added to.
        cut: the cut that they give.

    Raises:
        CorpusError: another driver has written counts meanwhile.
    """
    table = schemas.cuts(name)
    metadata = {"query_id": counted.query_id, "batch_id": counted.through, "cut": dataclasses.asdict(cut)}
    corpus_records.commit(_frame(spark, table, counted), uri, table, metadata, counted.on, replaces=True)


def _frame(spark: "SparkSession", table: schemas.Table, counted: Counted) -> "DataFrame":
    import pyarrow as pa

    n_rows = len(counted.counts)
    buckets = sorted(counted.counts)
    columns: dict[str, list[Any]] = {
        "bucket": buckets,
        "n_rows": [counted.counts[bucket][0] for bucket in buckets],
        "n_tokens": [counted.counts[bucket][1] for bucket in buckets],
        "config": [counted.config] * n_rows,
        "query_id": [counted.query_id] * n_rows,
        "batch_id": [counted.through] * n_rows,
    }
    return spark.createDataFrame(pa.table(columns, schema=table.arrow_schema())).coalesce(1)
