"""Mergeable counts of a corpus's candidates, in buckets of the score, kept in Delta; and the cut that they give.

    score -> bucket, a fixed integer function that never falls -> candidates and tokens by bucket -> bucket of the cut

The counts are sums over all of the matrix's micro-batches up to one: a new one is added, none is read again.
`cuts/<name>` holds the newest counts alone, some ten thousand rows at most; each commit replaces them and has the cut
that was taken as its `userMetadata`. The counts are exact; the cut falls between two buckets, so its rank is wrong by
at most the rows of the one bucket that holds the exact cut. A replay finds its micro-batch counted. Driver only.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, schemas, storage, tables
from miniplm_udf.config import SelectConfig
from miniplm_udf.refinement.selection import UNUSABLE, budget_of, n_fitting

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# A bucket is a thousandth of its scores wide, and a millionth near 0.
BUCKETS_PER_E = 1024
_UNITS, _LARGEST = 1000.0, 1e300
# Rows and tokens by bucket.
Counts = Mapping[int, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class BucketCut:
    """A cut between two buckets.

    Attributes:
        bucket: the lowest one that is kept.
        score: its lower edge; of a threshold rule, the threshold.
        budget: what the rule allows, in instances or tokens; None for a threshold.
        n_within: what the kept buckets hold, in the same unit.
        boundary_rows: rows of the bucket that holds the exact cut: by so many ranks at most is this one wrong.
    """

    bucket: int
    score: float
    budget: int | None
    n_within: int
    boundary_rows: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted.

    Attributes:
        config: fingerprint of the corpus config that it is counted for.
        query_id: of the matrix's rows.
        through: the micro-batch of the matrix up to which rows are counted; -1: none is.
        counts: by bucket.
        on: the state of the table that this rests on.
    """

    config: str
    query_id: str
    through: int
    counts: Counts
    on: corpora.Newest | None = None

    def plus(self, counts: Counts, through: int) -> "Counted":
        return dataclasses.replace(self, counts=merged(self.counts, counts), through=through)


def bucket_number(score: "Column") -> "Column":
    """A bigint that never falls as the (finite) score rises, and that is negative where the score is.

    `lower_edge` is its inverse.
    """
    from pyspark.sql import functions as F

    # Java's log1p never falls, nor do a product with a constant and floor.
    size = F.log1p(F.least(F.abs(score), F.lit(_LARGEST)) * F.lit(_UNITS)) * F.lit(float(BUCKETS_PER_E))
    return F.floor(F.when(score < 0, -size).otherwise(size))


def lower_edge(bucket: int) -> float:
    """The score at which a bucket begins."""
    return math.copysign(math.expm1(abs(bucket) / BUCKETS_PER_E) / _UNITS, bucket)


def bucket_column(select: SelectConfig, usable: "Column") -> "Column":
    """The bucket of a row with the column `score`, a bigint. Every finite score of a threshold rule is on one side."""
    from pyspark.sql import functions as F

    score = F.col("score")
    if select.rule == "threshold":
        bucket = F.when(score >= F.lit(float(select.threshold or 0)), F.lit(1)).otherwise(F.lit(0)).cast("bigint")
    else:
        bucket = bucket_number(score)
    return F.when(usable, bucket).otherwise(F.lit(UNUSABLE).cast("bigint"))


def merged(counts: Counts, more: Counts) -> Counts:
    """The sums of two counts."""
    rows = {bucket: counts.get(bucket, (0, 0)) for bucket in counts.keys() | more.keys()}
    return {
        bucket: (n_rows + more.get(bucket, (0, 0))[0], n_tokens + more.get(bucket, (0, 0))[1])
        for bucket, (n_rows, n_tokens) in rows.items()
    }


def totals(counts: Counts) -> tuple[int, int]:
    """Candidates, and their tokens."""
    return sum(n_rows for n_rows, _ in counts.values()), sum(n_tokens for _, n_tokens in counts.values())


def cut_of(counts: Counts, select: SelectConfig) -> BucketCut:
    """The cut of a rule. The bucket that holds the exact cut is kept where more than half of it fits."""
    by_tokens = select.rule != "threshold" and select.by == "tokens"
    ordered = sorted(((bucket, *of) for bucket, of in counts.items() if bucket != UNUSABLE), reverse=True)
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
    # Nothing fits: above the highest bucket. No candidate yet: any.
    lowest = ordered[n_kept - 1][0] if n_kept else ordered[0][0] + 1 if ordered else 0
    return BucketCut(lowest, lower_edge(lowest), budget, within, boundary_rows)


def cuts_uri(root: str, name: str) -> str:
    return storage.join(storage.to_uri(root), "tables", "cuts", name)


def read(spark: "SparkSession", uri: str, config: str, query_id: str) -> Counted:
    """What is counted for a corpus config (its fingerprint) of the rows of a query of the matrix."""
    nothing = Counted(config, query_id, -1, {}, corpora.newest(spark, uri))
    if nothing.on is None:
        return nothing
    rows = tables.read(spark, uri, nothing.on.base).collect()
    if not rows or (rows[0]["config"], rows[0]["query_id"]) != (config, query_id):
        return nothing
    return nothing.plus({row["bucket"]: (row["n_rows"], row["n_tokens"]) for row in rows}, rows[0]["batch_id"])


def write(spark: "SparkSession", uri: str, name: str, counted: Counted, cut: BucketCut) -> None:
    """Replaces what is counted.

    Raises:
        CorpusError: another driver has counted meanwhile.
    """
    table = schemas.cuts(name)
    metadata = {"query_id": counted.query_id, "batch_id": counted.through, "cut": dataclasses.asdict(cut)}
    corpora.commit(_frame(spark, table, counted), uri, table, metadata, counted.on, replaces=True)


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
