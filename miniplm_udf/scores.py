"""The micro-batches of the score job: pool instances -> `scores` and `rejects`. Driver only; models run in `udf.py`.

    instances (split = pool) -> rows still missing, per model -> mapInArrow -> one append to scores -> rejects

Scores only what is missing: rows of another query (a lost checkpoint, another set of models) are found by an anti-join
that Delta's statistics make free in the steady state; rows rejected earlier are not tried again. A micro-batch commits
`scores` once, under its (query_id, batch_id); everything else is derived from the committed rows. A replayed
micro-batch finds its rows and skips scoring; killed before its commit, it scores again and nothing of the first try
remains.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miniplm_udf import schemas, tables
from miniplm_udf.config import ScoreConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streaming import RunningQuery, start_query
from miniplm_udf.udf import SCORED_DDL, ScorerLike, score_arrow

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

Factory = Callable[[], ScorerLike]

# instance_id, model_id, reason, detail
Failed = tuple[str, str, str, str | None]

LOGGER = logging.getLogger("miniplm.score")

_STAGE = "score:"
# Reasons and details that are carried over the driver; rejects beyond are written as not_scored.
_MAX_REASONS = 100_000
_INSTANCE_COLUMNS = ("instance_id", "text", "segment_ends", "ends_document")


@dataclasses.dataclass
class ModelCounts:
    """What one run scored with one model. `seconds` are those that workers spent in the scorer, loading aside."""

    n_scored: int = 0
    n_failed: int = 0
    n_tokens: int = 0
    seconds: float = 0.0

    def add(self, other: "ModelCounts") -> None:
        self.n_scored += other.n_scored
        self.n_failed += other.n_failed
        self.n_tokens += other.n_tokens
        self.seconds += other.seconds

    @property
    def tokens_per_second(self) -> float | None:
        return round(self.n_tokens / self.seconds, 2) if self.n_tokens and self.seconds > 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What to score with, and where the rows go.

    Attributes:
        models: one of each revision; two aliases of one model are scored once, under the first.
        factories: makers of their scorers, by alias.
        workers: concurrent scorers.
        run_id: the command that scores.
    """

    models: tuple[ModelDescription, ...]
    factories: Mapping[str, Factory]
    instances_uri: str
    scores_uri: str
    rejects_uri: str
    workers: int
    run_id: str

    @property
    def revisions(self) -> list[str]:
        return [model.model_revision for model in self.models]

    @property
    def stages(self) -> list[str]:
        return [_STAGE + revision for revision in self.revisions]


def distinct_revisions(descriptions: dict[str, ModelDescription]) -> tuple[ModelDescription, ...]:
    """The models to score with: the first alias of each revision."""
    first: dict[str, ModelDescription] = {}
    for description in descriptions.values():
        first.setdefault(description.model_revision, description)
    return tuple(first.values())


def checkpoint_name(models: tuple[ModelDescription, ...]) -> str:
    """A set of models has its own query: another set looks at every instance again, and scores what is missing."""
    return "score-" + fingerprint(sorted(model.model_revision for model in models))


def start_scoring(
    spark: "SparkSession", plan: ScoringPlan, checkpoint_uri: str, config: ScoreConfig, counts: dict[str, ModelCounts]
) -> RunningQuery:
    """Starts the query. `counts` (by alias) grows with every micro-batch.

    Raises:
        CorpusError: there is no table of instances.
    """
    if not tables.exists(spark, plan.instances_uri):
        raise CorpusError(
            f"table {plan.instances_uri}: expected instances to score, found no table; run `miniplm ingest` first"
        )
    tables.create(spark, plan.scores_uri, schemas.SCORES)
    tables.create(spark, plan.rejects_uri, schemas.REJECTS)

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        found = score_batch(plan, query_id, batch, batch_id)
        _log(batch_id, found)
        for alias, of_batch in found.items():
            counts.setdefault(alias, ModelCounts()).add(of_batch)

    stream = (
        spark.readStream.format("delta")
        .option("maxBytesPerTrigger", config.max_bytes_per_trigger)
        .load(plan.instances_uri)
        .where("split = 'pool'")
        .select(*_INSTANCE_COLUMNS)
    )
    return start_query(stream, micro_batch, checkpoint_uri, config)


def _log(batch_id: int, found: dict[str, ModelCounts]) -> None:
    for alias, counts in found.items():
        LOGGER.info(
            "score: micro-batch %d, %s: %d instances, %d failed, %d tokens, %s tokens/s",
            batch_id, alias, counts.n_scored, counts.n_failed, counts.n_tokens, counts.tokens_per_second,
        )  # fmt: skip


def score_batch(plan: ScoringPlan, query_id: str, batch: "DataFrame", batch_id: int) -> dict[str, ModelCounts]:
    """Scores what is missing of a micro-batch, commits it once, and rejects what could not be scored.

    Args:
        batch: pool instances: instance_id, text, segment_ends, ends_document.

    Returns:
        What was scored, by alias; empty for a replay and where nothing was missing.
    """
    spark = batch.sparkSession
    ids = batch.select("instance_id").persist()
    scored: DataFrame | None = None
    counts: dict[str, ModelCounts] = {}
    failures: list[Failed] = []
    try:
        replayed = not _committed(spark, plan, query_id, batch_id).isEmpty()
        if not replayed:
            missing = _missing(spark, plan, query_id, batch, ids).repartition(plan.workers, "instance_id")
            scored = missing.mapInArrow(score_arrow(plan.factories), SCORED_DDL).persist()
            counts = _counts(scored)
            # Before the append: it makes Spark forget what is persisted of frames that read `scores`, as this one does
            # to find what is missing, and another look at it would score everything again.
            failures = _failures(scored)
            if any(of_model.n_scored for of_model in counts.values()):
                rows = _score_rows(spark, plan, scored.where(_is_good()), query_id, batch_id)
                tables.append(rows, plan.scores_uri, schemas.SCORES, query_id, batch_id)
        if replayed or any(of_model.n_failed for of_model in counts.values()):
            _reject(spark, plan, ids, failures, query_id, batch_id)
    finally:
        if scored is not None:
            scored.unpersist()
        ids.unpersist()
    return counts


def _is_good() -> "Column":
    from pyspark.sql import functions as F

    total = F.col("nll_sum_nats")
    return F.col("reason").isNull() & total.isNotNull() & ~F.isnan(total) & (F.abs(total) < float("inf"))


def _committed(spark: "SparkSession", plan: ScoringPlan, query_id: str, batch_id: int) -> "DataFrame":
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri)
    return scores.where((F.col("query_id") == query_id) & (F.col("batch_id") == batch_id))


def _missing(
    spark: "SparkSession", plan: ScoringPlan, query_id: str, batch: "DataFrame", ids: "DataFrame"
) -> "DataFrame":
    """Instances that a model has neither scored nor rejected, with the aliases of such models as `model_ids`."""
    from pyspark.sql import functions as F

    # What this query wrote in earlier micro-batches is of other instances: files of it alone are not even opened.
    by_others = (
        spark.read.format("delta").load(plan.scores_uri)
        .where(F.col("model_revision").isin(plan.revisions) & (F.col("query_id") != query_id))
        .select("instance_id", "model_revision")
    )  # fmt: skip
    rejected = (
        spark.read.format("delta").load(plan.rejects_uri)
        .where(F.col("stage").isin(plan.stages))
        .select("instance_id", F.expr(f"substring(stage, {len(_STAGE) + 1})").alias("model_revision"))
    )  # fmt: skip
    done = (
        by_others.unionAll(rejected)
        .join(ids, "instance_id", "left_semi")
        .groupBy("instance_id")
        .agg(F.collect_set("model_revision").alias("done"))
    )
    wanted = F.array(
        *(
            F.when(F.col("done").isNull() | ~F.array_contains("done", model.model_revision), F.lit(model.model_id))
            for model in plan.models
        )
    )
    todo = batch.join(done, "instance_id", "left").withColumn("model_ids", F.array_compact(wanted))
    return todo.where(F.size("model_ids") > 0).select(*_INSTANCE_COLUMNS, "model_ids")


def _counts(scored: "DataFrame") -> dict[str, ModelCounts]:
    """Runs the scoring, all of it, once: `scored` is persisted."""
    from pyspark.sql import functions as F

    good = _is_good()
    rows = scored.groupBy("model_id").agg(
        F.count_if(good), F.count_if(~good), F.sum(F.when(good, F.col("n_tokens"))), F.sum("seconds")
    )
    return {
        alias: ModelCounts(n_scored, n_failed, n_tokens or 0, seconds or 0.0)
        for alias, n_scored, n_failed, n_tokens, seconds in sorted(rows.collect())
    }


def _failures(scored: "DataFrame") -> list[Failed]:
    from pyspark.sql import functions as F

    reason = F.coalesce("reason", F.lit("nan_score"))
    failed = scored.where(~_is_good()).select("instance_id", "model_id", reason, F.substring("detail", 1, 1000))
    return [tuple(row) for row in failed.limit(_MAX_REASONS).collect()]


def _models_frame(spark: "SparkSession", plan: ScoringPlan) -> "DataFrame":
    from pyspark.sql import functions as F

    rows = [(m.model_id, m.model_revision, m.tokenizer_hash, m.dtype, m.context_tokens) for m in plan.models]
    columns = "model_id string, model_revision string, tokenizer_hash string, dtype string, context_tokens bigint"
    return F.broadcast(spark.createDataFrame(rows, columns))


def _score_rows(
    spark: "SparkSession", plan: ScoringPlan, good: "DataFrame", query_id: str, batch_id: int
) -> "DataFrame":
    from pyspark.sql import functions as F

    return (
        good.join(_models_frame(spark, plan), "model_id")
        .withColumn("run_id", F.lit(plan.run_id))
        .withColumn("scored_at", F.current_timestamp())
        .withColumn("query_id", F.lit(query_id))
        .withColumn("batch_id", F.lit(batch_id).cast("bigint"))
        .select(*schemas.SCORES.column_names)
    )


def _reject(
    spark: "SparkSession", plan: ScoringPlan, ids: "DataFrame", failures: list[Failed], query_id: str, batch_id: int
) -> None:
    """Rejects the batch's (instance, model) pairs without a committed row; the reason where this run still knows it."""
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    of_batch = (F.col("query_id") == query_id) & (F.col("batch_id") == batch_id)
    committed = scores.where(of_batch | (F.col("query_id") != query_id)).select("instance_id", "model_revision")
    pairs = ids.crossJoin(_models_frame(spark, plan).select("model_id", "model_revision"))
    unscored = pairs.join(committed, ["instance_id", "model_revision"], "left_anti")
    reasons = spark.createDataFrame(failures, "instance_id string, model_id string, reason string, detail string")
    unscored = unscored.join(reasons, ["instance_id", "model_id"], "left")
    stage = F.concat(F.lit(_STAGE), F.col("model_revision"))
    rows = unscored.select(
        # Of the place alone: a replay, which no longer knows the reason, finds the same reject.
        F.md5(F.concat_ws("/", stage, "instance_id").cast("binary")).alias("reject_id"),
        stage.alias("stage"),
        F.coalesce("reason", F.lit("not_scored")).alias("reason"),
        "detail",
        F.lit(None).cast("string").alias("source_file"),
        "instance_id",
        F.lit(None).cast("binary").alias("raw"),
        F.lit(None).cast("bigint").alias("n_bytes"),
        F.current_timestamp().alias("rejected_at"),
        F.lit(query_id).alias("query_id"),
        F.lit(batch_id).cast("bigint").alias("batch_id"),
    )
    known = spark.read.format("delta").load(plan.rejects_uri).where(F.col("stage").isin(plan.stages))
    new = tables.missing_from(rows, known, "reject_id").persist()
    try:
        if not new.isEmpty():
            tables.append(new, plan.rejects_uri, schemas.REJECTS, query_id, batch_id)
    finally:
        new.unpersist()


def totals(spark: "SparkSession", plan: ScoringPlan) -> dict[str, int]:
    """Rows of `scores` by model revision."""
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    return {row[0]: row[1] for row in scores.groupBy("model_revision").count().collect()}


def n_rejected(spark: "SparkSession", plan: ScoringPlan) -> int:
    """Rejected (instance, model) pairs of the plan's models."""
    from pyspark.sql import functions as F

    return int(spark.read.format("delta").load(plan.rejects_uri).where(F.col("stage").isin(plan.stages)).count())
