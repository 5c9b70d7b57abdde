"""What a refinement looks like from outside: signs of a poor pair of models, of a poor rule, of what was lost before.

Inputs: candidates with `score`, sums over them by source and length, the table `rejects`. Output: a dict of plain
numbers for the summary, the provenance and the report, with `notes`, sentences to read. Spearman's correlation comes
from joint counts in buckets of score and loss (one pass, no sort), with a bound of its error. Judges nothing away:
a diagnostic never changes a selection. Driver only; a retry counts again.

    rho = cov(R, S) / (sd R * sd S), R and S the ranks; a bucket's rows all have the mean of its ranks
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import proxy_records, tables
from miniplm_udf.config import CorpusConfig, ExperimentConfig
from miniplm_udf.refinement.selection import is_finite, quick_number
from miniplm_udf.rules import is_random

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

# Above this, the score says little that the reference's loss alone does not.
_TOO_NEAR = 0.9
_SCORE_BUCKETS, _LOSS_BUCKETS = 128, 32
# Of a rule of sums: as soon as this share of the candidates is of another length than the most.
_OF_OTHER_LENGTH = 0.1


def length_bucket() -> "Column":
    """k for instances of 2**k up to 2**(k + 1) tokens."""
    from pyspark.sql import functions as F

    return F.floor(F.log2(F.col("n_tokens") + F.lit(0.5)))


def diagnose(
    spark: "SparkSession", config: ExperimentConfig, corpus: CorpusConfig, rows: "DataFrame", sums: "Sequence[Row]"
) -> dict[str, Any]:
    """Everything, after the selection.

    Args:
        corpus: resolved.
        rows: the candidates.
        sums: of them by source and `length`: n_rows, n_unusable, n_negative, n_kept.

    Returns:
        negative_share: of candidates with a finite score, those below 0. spearman_with_reference_loss and
        spearman_error: the correlation of the score with the reference's mean loss, and what it is wrong by at most;
        null where there is no reference, or the order is random. kept_share_by_length: by tokens, "32-63".
        rejects: rows by reason. notes.
    """
    usable = sum(row["n_rows"] - row["n_unusable"] for row in sums)
    alias = config.reference.alias if config.reference else corpus.aliases.get("reference", "reference")
    has_loss = f"{alias}_nll_mean" in rows.columns and not is_random(corpus)
    found = rank_correlation(rows, f"{alias}_nll_mean") if has_loss else None
    diagnostics = {
        "negative_share": sum(row["n_negative"] for row in sums) / usable if usable else None,
        "spearman_with_reference_loss": found[0] if found else None,
        "spearman_error": found[1] if found else None,
        "kept_share_by_length": kept_share_by_length(sums),
        "rejects": rejects(spark, config),
    }
    proxy = proxy_records.read(config.root) if corpus.is_of_proxy else None
    of_proxy = proxy.warnings if proxy else []
    return {**diagnostics, "notes": [*notes(config, corpus, alias, found, sums), *of_proxy]}


def kept_share_by_length(sums: "Sequence[Row]") -> dict[str, float]:
    by_length: dict[int, tuple[int, int]] = {}
    for row in sums:
        n_kept, n_rows = by_length.get(row["length"], (0, 0))
        by_length[row["length"]] = (n_kept + row["n_kept"], n_rows + row["n_rows"])
    return {f"{1 << k}-{(2 << k) - 1}": n_kept / n for k, (n_kept, n) in sorted(by_length.items())}


def rejects(spark: "SparkSession", config: ExperimentConfig) -> dict[str, int]:
    """Rejected rows by reason."""
    uri = config.table_uri("rejects")
    if not tables.exists(spark, uri):
        return {}
    return {row[0]: row[1] for row in tables.read(spark, uri).groupBy("reason").count().orderBy("reason").collect()}


def notes(
    config: ExperimentConfig, corpus: CorpusConfig, alias: str, spearman: tuple[float, float] | None,
    sums: "Sequence[Row]",
) -> list[str]:  # fmt: skip
    """What someone should look at."""
    found = []
    score = str(corpus.score)
    used = {name for name in config.scored_aliases if re.search(rf"\b{name}_", score)}
    if spearman and spearman[0] >= _TOO_NEAR and len(used) > 1:
        found.append(
            f"the score ranks almost as the loss of {alias} alone does (Spearman {spearman[0]:.3f}): the teacher is "
            "too strong for this reference; train a larger reference, or take a smaller teacher"
        )
    by_length: dict[int, int] = {}
    for row in sums:
        by_length[row["length"]] = by_length.get(row["length"], 0) + row["n_rows"]
    n_rows = sum(by_length.values())
    if "_nll_sum_nats" in score and n_rows and max(by_length.values()) < (1 - _OF_OTHER_LENGTH) * n_rows:
        found.append(
            "the score is a sum over the text and lengths vary: it ranks by length too; take means, or packed chunking"
        )
    return found


def rank_correlation(rows: "DataFrame", loss: str) -> tuple[float, float] | None:
    """Spearman's correlation of `score` with a column of losses, and a bound of its error. One pass."""
    from pyspark.sql import functions as F

    joint = (
        rows.where(is_finite() & F.col(loss).isNotNull())
        .groupBy(
            quick_number(F.col("score"), _SCORE_BUCKETS).alias("score"),
            quick_number(F.col(loss), _LOSS_BUCKETS).alias("loss"),
        )
        .count()
    )
    return spearman({(row["score"], row["loss"]): row["count"] for row in joint.collect()})


def spearman(joint: Mapping[tuple[int, int], int]) -> tuple[float, float] | None:
    """Spearman's correlation of two rankings that are known by bucket, and a bound of what the buckets hide.

    With e and f what the ranks differ by from their buckets' means, |cov(R, S) - cov(R', S')| is at most
    sd R' sd f + sd e sd S' + sd e sd f, and var e at most (n^2 - 1) / 12 in a bucket of n rows.

    Args:
        joint: rows by (bucket of the one, bucket of the other); higher is higher.

    Returns:
        None where all rows of either are in one bucket.
    """
    (first, first_sd, first_hidden), (second, second_sd, second_hidden) = (_ranks(joint, side) for side in (0, 1))
    if not first_sd or not second_sd:
        return None
    n_rows = sum(joint.values())
    covariance = math.fsum(n * first[a] * second[b] for (a, b), n in joint.items()) / n_rows
    found = covariance / (first_sd * second_sd)
    error = first_hidden / first_sd + second_hidden / second_sd
    error += (first_hidden * second_hidden) / (first_sd * second_sd)
    shrink = first_sd * second_sd / (math.hypot(first_sd, first_hidden) * math.hypot(second_sd, second_hidden))
    return found, min(error + abs(found) * (1 - shrink), 2.0)


def _ranks(joint: Mapping[tuple[int, int], int], side: int) -> tuple[dict[int, float], float, float]:
    """Of each bucket the mean rank less that of all rows; its standard deviation; at most that within the buckets."""
    sizes: dict[int, int] = {}
    for key, n in joint.items():
        sizes[key[side]] = sizes.get(key[side], 0) + n
    n_rows, before = sum(sizes.values()), 0
    ranks: dict[int, float] = {}
    for bucket in sorted(sizes):
        ranks[bucket] = before + (sizes[bucket] - n_rows) / 2
        before += sizes[bucket]
    if not n_rows:
        return {}, 0.0, 0.0
    between = math.fsum(n * ranks[bucket] ** 2 for bucket, n in sizes.items()) / n_rows
    within = math.fsum(n * (n * n - 1) / 12 for n in sizes.values()) / n_rows
    return ranks, math.sqrt(between), math.sqrt(within)
