"""Diagnostics of a refinement: signs of a poor pair of models, of a poor rule, and of rows that were lost earlier.

Inputs: candidates with `score`, sums over them by source and length, the table `rejects`. Output: a dict of plain
numbers for the summary, the provenance and the report, with `notes`, sentences for people. Spearman's correlation comes
from joint counts in buckets of score and loss (one pass, no sort), with a bound on its error. A diagnostic never
changes a selection. Driver only; a retry counts again.

    rho = cov(R, S) / (sd R * sd S), R and S the ranks; all rows of a bucket have its mean rank
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.config.rules import is_random
from miniplm_udf.refinement.selection import is_finite, score_bucket
from miniplm_udf.store import proxy_records, tables
from miniplm_udf.store.provenance import Diagnostics

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

# From this correlation on, the score says little more than the reference's loss alone.
_TOO_NEAR = 0.9
_SCORE_BUCKETS, _LOSS_BUCKETS = 128, 32
# A score that is a sum gets a note if at least this share of the candidates is outside the commonest length bucket.
_OF_OTHER_LENGTH = 0.1


def length_bucket() -> "Column":
    """The length bucket k of an instance, which has from 2**k to 2**(k + 1) - 1 tokens."""
    from pyspark.sql import functions as F

    return F.floor(F.log2(F.col("n_tokens") + F.lit(0.5)))


def diagnose(
    spark: "SparkSession", config: ExperimentConfig, corpus: CorpusConfig, rows: "DataFrame", sums: "Sequence[Row]"
) -> Diagnostics:
    """Returns all diagnostics, computed after the selection.

    Args:
        spark: any session.
        config: the experiment.
        corpus: the resolved config of the corpus.
        rows: the candidates.
        sums: sums over them by `source` and `length`: n_rows, n_unusable, n_negative, n_kept.

    """
    usable = sum(row["n_rows"] - row["n_unusable"] for row in sums)
    alias = config.reference.alias if config.reference else corpus.aliases.get("reference", "reference")
    has_loss = f"{alias}_nll_mean" in rows.columns and not is_random(corpus)
    correlation = rank_correlation(rows, f"{alias}_nll_mean") if has_loss else None
    proxy = proxy_records.read(config.root) if corpus.is_of_proxy else None
    proxy_warnings = proxy.warnings if proxy else []
    return {
        "negative_share": sum(row["n_negative"] for row in sums) / usable if usable else None,
        "spearman_with_reference_loss": correlation[0] if correlation else None,
        "spearman_error": correlation[1] if correlation else None,
        "kept_share_by_length": kept_share_by_length(sums),
        "rejects": rejects(spark, config),
        "notes": [*notes(config, corpus, alias, correlation, sums), *proxy_warnings],
    }


def kept_share_by_length(sums: "Sequence[Row]") -> dict[str, float]:
    """The share of the candidates that was kept, 0 to 1, by range of tokens, e.g. "32-63".

    Args:
        sums: see `diagnose`.
    """
    by_length: dict[int, tuple[int, int]] = {}
    for row in sums:
        n_kept, n_rows = by_length.get(row["length"], (0, 0))
        by_length[row["length"]] = (n_kept + row["n_kept"], n_rows + row["n_rows"])
    return {f"{1 << k}-{(2 << k) - 1}": n_kept / n for k, (n_kept, n) in sorted(by_length.items())}


def rejects(spark: "SparkSession", config: ExperimentConfig) -> dict[str, int]:
    """Counts the rejected rows of all stages.

    Args:
        spark: any session.
        config: the experiment.

    Returns:
        Rows by reason, sorted by reason; empty if there is no table `rejects`.
    """
    uri = config.layout.table("rejects")
    if not tables.exists(spark, uri):
        return {}
    return {row[0]: row[1] for row in tables.read(spark, uri).groupBy("reason").count().orderBy("reason").collect()}


def notes(
    config: ExperimentConfig, corpus: CorpusConfig, alias: str, spearman: tuple[float, float] | None,
    sums: "Sequence[Row]",
) -> list[str]:  # fmt: skip
    """Returns sentences that name what a user should check.

    Args:
        config: the experiment.
        corpus: the resolved config of the corpus.
        alias: alias of the reference.
        spearman: correlation of the score with the reference's loss, and its error; None if there is none.
        sums: see `diagnose`.
    """
    sentences = []
    score = str(corpus.score)
    used = {name for name in config.scored_aliases if re.search(rf"\b{name}_", score)}
    if spearman and spearman[0] >= _TOO_NEAR and len(used) > 1:
        sentences.append(
            f"the score ranks almost as the loss of {alias} alone does (Spearman {spearman[0]:.3f}): the teacher is "
            "too strong for this reference; train a larger reference, or take a smaller teacher"
        )
    by_length: dict[int, int] = {}
    for row in sums:
        by_length[row["length"]] = by_length.get(row["length"], 0) + row["n_rows"]
    n_rows = sum(by_length.values())
    if "_nll_sum_nats" in score and n_rows and max(by_length.values()) < (1 - _OF_OTHER_LENGTH) * n_rows:
        sentences.append(
            "the score is a sum over the text and lengths vary: it ranks by length too; take means, or packed chunking"
        )
    return sentences


def rank_correlation(rows: "DataFrame", loss: str) -> tuple[float, float] | None:
    """Returns Spearman's correlation of `score` with a column of losses, and a bound on its error (see `spearman`).

    Args:
        rows: the candidates; rows without a finite score or without a loss are left out.
        loss: name of the column, nats per token.
    """
    from pyspark.sql import functions as F

    joint = (
        rows.where(is_finite() & F.col(loss).isNotNull())
        .groupBy(
            score_bucket(F.col("score"), _SCORE_BUCKETS).alias("score"),
            score_bucket(F.col(loss), _LOSS_BUCKETS).alias("loss"),
        )
        .count()
    )
    return spearman({(row["score"], row["loss"]): row["count"] for row in joint.collect()})


def spearman(joint: Mapping[tuple[int, int], int]) -> tuple[float, float] | None:
    """Spearman's correlation of two rankings of which only the buckets are known, and a bound on its error.

    Let e and f be the differences of the ranks from the mean ranks of their buckets. Then |cov(R, S) - cov(R', S')| is
    at most sd R' sd f + sd e sd S' + sd e sd f, and var e is at most (n^2 - 1) / 12 in a bucket of n rows.

    Args:
        joint: number of rows by (bucket in the first ranking, bucket in the second); higher buckets rank higher.

    Returns:
        The correlation and the bound; None if all rows are in one bucket of either ranking.
    """
    (first, first_sd, first_hidden), (second, second_sd, second_hidden) = (_ranks(joint, side) for side in (0, 1))
    if not first_sd or not second_sd:
        return None
    n_rows = sum(joint.values())
    covariance = math.fsum(n * first[a] * second[b] for (a, b), n in joint.items()) / n_rows
    correlation = covariance / (first_sd * second_sd)
    error = first_hidden / first_sd + second_hidden / second_sd
    error += (first_hidden * second_hidden) / (first_sd * second_sd)
    shrink = first_sd * second_sd / (math.hypot(first_sd, first_hidden) * math.hypot(second_sd, second_hidden))
    return correlation, min(error + abs(correlation) * (1 - shrink), 2.0)


def _ranks(joint: Mapping[tuple[int, int], int], side: int) -> tuple[dict[int, float], float, float]:
    """Mean ranks of one ranking's buckets.

    Returns:
        By bucket, its mean rank minus the mean rank of all rows; the standard deviation of these over all rows; and the
        largest possible standard deviation of ranks within their buckets.
    """
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
