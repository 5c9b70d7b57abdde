"""Measures how much each model gains from the first half of a text, on a small sample of the scored instances.

    gain = mean over texts of nll(first half) / bytes - (nll(whole) - nll(first half)) / bytes of the second half

`scores` has one sum for each text, so the first halves are scored once more by the same scorers; a causal model's loss
of the second half, given the first, is the rest. Input: `instances` and `scores`; output: nats per byte in each model's
record (`store/context_gains.py`). A model whose record has a gain is not measured again. Driver only; the models run in
`workers/`. A retry measures what is missing.
"""

import logging
import statistics
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.scores.gpus import scoring_profile
from miniplm_udf.scores.plan import ScoringPlan
from miniplm_udf.store import context_gains, tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

LOGGER = logging.getLogger("miniplm.score")

# Enough for a mean that is right to about a twentieth of a nat per byte; the demo's teacher takes ten seconds for them.
SAMPLE_ROWS = 48
_MIN_BYTES = 256
_MAX_BYTES = 1 << 16


def measure_gains(spark: "SparkSession", config: ExperimentConfig, plan: ScoringPlan) -> dict[str, float]:
    """Measures the gains that the models' records do not have yet, and writes them there.

    Args:
        spark: the session in which the models have scored.
        config: the experiment.
        plan: the models and the tables, which must exist.

    Returns:
        Nats per byte of the models that were measured now, by alias; a model without a text to measure is left out.
    """
    aliases = [model.model_id for model in plan.models]
    missing = [alias for alias in aliases if alias not in context_gains.read(config, aliases)]
    if not missing:
        return {}
    sample = _sample(spark, plan).persist()
    try:
        if sample.isEmpty():
            return {}
        LOGGER.info(
            "scoring the first halves of at most %d texts, to measure what %s gain from the context",
            SAMPLE_ROWS, " and ".join(missing),
        )  # fmt: skip
        firsts = _score_first_halves(sample, plan, missing).collect()
        wholes = _whole_scores(spark, sample, plan).collect()
    finally:
        sample.unpersist()
    revisions = {model.model_id: model.model_revision for model in plan.models}
    gains = {}
    for alias in missing:
        texts = {row["instance_id"]: row for row in wholes if row["model_revision"] == revisions[alias]}
        pairs = [(row, texts[row["instance_id"]]) for row in firsts if row["model_id"] == alias]
        if values := [gain for first, whole in pairs if (gain := gain_of(first, whole)) is not None]:
            gains[alias] = statistics.fmean(values)
            context_gains.keep(config, alias, revisions[alias], gains[alias])
            LOGGER.info("%s: gains %.3f nats/byte in the second half of %d texts", alias, gains[alias], len(values))
    return gains


def gain_of(first: "Row | dict[str, float]", whole: "Row | dict[str, float]") -> float | None:
    """Returns the gain of a model in the second half of one text, in nats per byte; None if a half has no bytes.

    Args:
        first: `nll_sum_nats` and `n_bytes` of the first half, scored alone.
        whole: the same of the whole text.
    """
    rest = whole["n_bytes"] - first["n_bytes"]
    if first["n_bytes"] <= 0 or rest <= 0:
        return None
    return float(first["nll_sum_nats"] / first["n_bytes"] - (whole["nll_sum_nats"] - first["nll_sum_nats"]) / rest)


def _sample(spark: "SparkSession", plan: ScoringPlan) -> "DataFrame":
    """The first rows of the pool by a hash of their id, of a medium length, that every model of the plan has scored."""
    from pyspark.sql import functions as F

    scores = tables.read(spark, plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    scored = scores.groupBy("instance_id").count().where(F.col("count") == len(set(plan.revisions)))
    return (
        tables.read(spark, plan.instances_uri)
        .where((F.col("split") == "pool") & F.col("n_bytes").between(_MIN_BYTES, _MAX_BYTES))
        .join(scored.select("instance_id"), "instance_id", "left_semi")
        .orderBy(F.xxhash64("instance_id"))
        .limit(SAMPLE_ROWS)
        .select("instance_id", "text", "segment_ends")
    )


def _score_first_halves(sample: "DataFrame", plan: ScoringPlan, aliases: list[str]) -> "DataFrame":
    from pyspark.sql import functions as F

    # These need pyarrow, which the base install has not.
    from miniplm_udf.workers.arrow import score_arrow
    from miniplm_udf.workers.messages import SCORED_SCHEMA, ddl

    half = F.expr("substring(text, 1, cast(length(text) / 2 as int))")
    requests = sample.withColumn("text", half).select(
        "instance_id",
        "text",
        F.expr("filter(segment_ends, x -> x <= octet_length(text))").alias("segment_ends"),
        F.lit(False).alias("ends_document"),
        F.array(*map(F.lit, aliases)).alias("model_ids"),
    )
    # A server needs no GPU here.
    workers_per_gpu = None if all(model.is_served for model in plan.models) else plan.workers_per_gpu
    scored = requests.coalesce(1).mapInArrow(
        score_arrow(plan.factories),
        ddl(SCORED_SCHEMA),
        profile=scoring_profile(sample.sparkSession, workers_per_gpu, plan.split_model),
    )
    return scored.where("reason is null").select("instance_id", "model_id", "nll_sum_nats", "n_bytes")


def _whole_scores(spark: "SparkSession", sample: "DataFrame", plan: ScoringPlan) -> "DataFrame":
    from pyspark.sql import functions as F

    scores = tables.read(spark, plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    rows = scores.join(F.broadcast(sample.select("instance_id")), "instance_id", "left_semi")
    return rows.select("instance_id", "model_revision", "nll_sum_nats", "n_bytes")
