"""Diagnostics of a refinement: signs of a poor pair of models, of a poor rule, and of rows that were lost earlier.

Inputs: candidates with `score`, sums over them by source and length, the table `rejects`. Output: a dict of plain
numbers for the summary, the provenance and the report, with `notes`, sentences for people. Spearman's correlation comes
from joint counts in buckets of score and loss (one pass, no sort), with a bound on its error; pair.py computes it. A
diagnostic never changes a selection. Driver only; a retry counts again.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.config.rules import is_random
from miniplm_udf.refinement.pair import pair_notes, spearman
from miniplm_udf.refinement.selection import is_finite, score_bucket
from miniplm_udf.store import context_gains, proxy_records, tables
from miniplm_udf.store.provenance import Diagnostics, PairNumbers

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

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
    proxy = proxy_records.read(config.root) if corpus.is_of_proxy else None
    proxy_warnings = proxy.warnings if proxy else []
    pair, teacher_error, reference_error = measure_pair(config, corpus, rows) or (None, None, None)
    return {
        "negative_share": sum(row["n_negative"] for row in sums) / usable if usable else None,
        "spearman_with_minus_teacher_loss": pair["spearman_with_minus_teacher_loss"] if pair else None,
        "spearman_with_reference_loss": pair["spearman_with_reference_loss"] if pair else None,
        "spearman_teacher_error": teacher_error,
        "spearman_error": reference_error,
        "pair": pair,
        "kept_share_by_length": kept_share_by_length(sums),
        "rejects": rejects(spark, config),
        "notes": [*notes(config, corpus, pair, sums), *proxy_warnings],
    }


def measure_pair(
    config: ExperimentConfig, corpus: CorpusConfig, rows: "DataFrame"
) -> tuple[PairNumbers, float, float] | None:
    """Compares a score with the losses of the two models: three passes over the candidates.

    The losses are means per byte if the score compares bits per byte, and means per token otherwise.

    Args:
        config: the experiment.
        corpus: the resolved config of the corpus.
        rows: the candidates.

    Returns:
        The numbers, and the largest possible errors of the correlations with the teacher and with the reference. None
        if the order is random, if the rows do not have the losses of both models, or if the score or a loss is the same
        everywhere.
    """
    from pyspark.sql import functions as F

    teacher = corpus.aliases.get("teacher", "teacher")
    reference = config.reference.alias if config.reference else corpus.aliases.get("reference", "reference")
    if is_random(corpus) or not {f"{teacher}_nll_mean", f"{reference}_nll_mean"} <= set(rows.columns):
        return None
    of_bytes = "_bits_per_byte" in str(corpus.score)
    losses = {
        alias: F.expr(f"{alias}_nll_mean * {alias}_n_tokens / n_bytes" if of_bytes else f"{alias}_nll_mean")
        for alias in (teacher, reference)
    }
    with_teacher = rank_correlation(rows, -losses[teacher])
    with_reference = rank_correlation(rows, losses[reference])
    spreads = rows.where(is_finite()).agg(*(F.stddev_pop(loss).alias(alias) for alias, loss in losses.items())).first()
    if with_teacher is None or with_reference is None or spreads is None:
        return None
    return (
        {
            "teacher": teacher,
            "reference": reference,
            "spearman_with_minus_teacher_loss": with_teacher[0],
            "spearman_with_reference_loss": with_reference[0],
            "spread": {alias: float(spreads[alias]) for alias in losses},
            "spread_unit": "nats/byte" if of_bytes else "nats/token",
            "context_gain": context_gains.read(config, (teacher, reference)),
        },
        with_teacher[1],
        with_reference[1],
    )


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


def notes(config: ExperimentConfig, corpus: CorpusConfig, pair: PairNumbers | None, sums: "Sequence[Row]") -> list[str]:
    """Returns sentences that name what a user should check.

    Args:
        config: the experiment.
        corpus: the resolved config of the corpus.
        pair: the score against the losses of both models; None if they were not compared.
        sums: see `diagnose`.
    """
    sentences = []
    score = str(corpus.score)
    used = {name for name in config.scored_aliases if re.search(rf"\b{name}_", score)}
    if pair and len(used) > 1:
        sentences += pair_notes(pair, str(corpus.where))
    by_length: dict[int, int] = {}
    for row in sums:
        by_length[row["length"]] = by_length.get(row["length"], 0) + row["n_rows"]
    n_rows = sum(by_length.values())
    if "_nll_sum_nats" in score and n_rows and max(by_length.values()) < (1 - _OF_OTHER_LENGTH) * n_rows:
        sentences.append(
            "the score is a sum over the text and lengths vary: it ranks by length too; take means, or packed chunking"
        )
    return sentences


def rank_correlation(rows: "DataFrame", loss: "Column") -> tuple[float, float] | None:
    """Returns Spearman's correlation of `score` with a column of losses, and a bound on its error (see `spearman`).

    Args:
        rows: the candidates; rows without a finite score or without a loss are left out.
        loss: the losses, in any unit.
    """
    from pyspark.sql import functions as F

    joint = (
        rows.where(is_finite() & loss.isNotNull())
        .groupBy(
            score_bucket(F.col("score"), _SCORE_BUCKETS).alias("score"),
            score_bucket(loss, _LOSS_BUCKETS).alias("loss"),
        )
        .count()
    )
    return spearman({(row["score"], row["loss"]): row["count"] for row in joint.collect()})
