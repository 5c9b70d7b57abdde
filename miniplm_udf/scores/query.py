"""The score query: pool instances -> `scores` and `rejects`. Driver only; the models run in `workers/`.

    instances (split = pool; the share `score.sample`) -> rows still missing, per model -> mapInArrow
              -> one append to `scores` -> `rejects`

Scores only what is missing. Another query may have scored or rejected a row (a lost checkpoint, another set of models).
The query looks for such rows only among instances that existed at its start. Only this driver scores instances added
later. The search opens only files from the micro-batch's time (`batch_range`). A
micro-batch commits `scores` once, under its (query_id, batch_id); everything else is derived from the committed rows.
A replayed micro-batch finds its rows and skips scoring; one that was killed before its commit scores again, and nothing
of the first attempt remains.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.layout import Root
from miniplm_udf.schemas import SCORE_STAGE
from miniplm_udf.scores.gpus import scoring_profile
from miniplm_udf.scores.instances import require_instances, stream_sample
from miniplm_udf.scores.models import keep_tokens_per_batch
from miniplm_udf.scores.plan import ScoringPlan
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store import batch_range, delta_log, rejections, tables
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.offsets import end_offset, is_behind
from miniplm_udf.streams.query import Query
from miniplm_udf.workers.score_counts import MAX_FAILED, FailedRow, ScoreCounts, ScoreCountsParam

if TYPE_CHECKING:
    from pyspark import Accumulator
    from pyspark.sql import Column, DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.score")

# File parts for each scorer. With at least 4, no scorer gets a quarter more text than another.
_PARTS_PER_WORKER = 4
_SCORED_COLUMNS = ("instance_id", "text", "segment_ends", "ends_document")
# Columns of the instance that are written with each score, so that `score_matrix` need not read `instances`.
_CARRIED = ("source", "split", "content_hash", "text_bytes", "instance_batch_id")
_MODEL_COLUMNS = ("model_revision", "tokenizer_hash", "dtype", "context_tokens")


def distinct_revisions(descriptions: dict[str, ModelDescription]) -> tuple[ModelDescription, ...]:
    """The models to score with: the first alias of each revision.

    Args:
        descriptions: descriptions of all configured models, by alias.
    """
    first_of_revision: dict[str, ModelDescription] = {}
    for description in descriptions.values():
        first_of_revision.setdefault(description.model_revision, description)
    return tuple(first_of_revision.values())


def checkpoint_name(models: tuple[ModelDescription, ...], sample: float = 1.0) -> str:
    """The name of the checkpoint of a set of models and a share of the pool.

    Each pair has a query of its own, which reads every instance again and scores what is missing.

    Args:
        models: the models to score with, in any order.
        sample: share of the pool to score, 0 to 1; a share below 1 is part of the name.
    """
    name = "score-" + fingerprint(sorted(model.model_revision for model in models))
    return name if sample >= 1 else f"{name}-{float(sample)!r}"


def new_score_counts(spark: "SparkSession") -> "Accumulator[ScoreCounts]":
    """The accumulator for the counts of a query's workers. Make one for each query: Spark never frees one."""
    return spark.sparkContext.accumulator(ScoreCounts(), ScoreCountsParam())


class ScoringQuery(Query):
    """The query that scores; makes the empty tables `scores` and `rejects` if there are none.

    Args:
        spark: a session.
        plan: models and tables.
        layout: the root with the models' records, which keep the token budgets that workers found.
        checkpoint_uri: checkpoint of the query (`checkpoint_name`).
        config: bytes of text in a micro-batch, and the share of the pool to score.
        total: gets the counts of every micro-batch added, without the failed rows.

    Raises:
        CorpusError: there is no table of instances.
    """

    def __init__(
        self, spark: "SparkSession", plan: ScoringPlan, layout: Root, checkpoint_uri: str, config: ScoreConfig,
        total: ScoreCounts,
    ) -> None:  # fmt: skip
        require_instances(spark, plan.instances_uri, "score")
        batch_range.create(spark, plan.scores_uri, schemas.SCORES, plan.instances_uri)
        tables.create(spark, plan.rejects_uri, schemas.REJECTS)
        facts = QueryFacts(
            stage="score", lease=checkpoint_name(plan.models, config.sample), source="instances", sample=config.sample,
            revisions={model.model_id: model.model_revision for model in plan.models},
        )  # fmt: skip
        super().__init__("score", facts, checkpoint_uri)
        # Lock each model too, so that two model sets never score a shared model at the same time.
        self.also = tuple(f"model-{revision}" for revision in plan.revisions)
        self.backlog_unit = "rows" if config.sample >= 1 else f"rows to draw {config.sample:g} of"
        self._spark, self._plan, self._layout, self._config, self._total = spark, plan, layout, config, total
        self._accumulator, self._history = new_score_counts(spark), _BatchHistory()

    def source(self) -> "DataFrame":
        # This driver holds the lease, so no other query can have scored rows that are added from now on.
        self._history.begin(delta_log.newest_version(self._plan.instances_uri) or 0)
        uri, config = self._plan.instances_uri, self._config
        return pool(stream_sample(self._spark, uri, config.sample, config.max_bytes_per_trigger))

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        history, plan = self._history, self._plan
        history.update(self.checkpoint_uri, batch_id)
        counts = score_batch(
            plan, query_id, batch, batch_id, self._accumulator, history.may_be_replay, history.may_be_known
        )
        history.may_be_replay = False
        for uri in (plan.scores_uri, plan.rejects_uri):
            tables.compact(self._spark, uri, batch_id)
        _log(batch_id, counts)
        # Without the failed rows, which are in the table `rejects` now.
        self._total.add(dataclasses.replace(counts, failed=[]))
        self._keep_budgets()

    def _keep_budgets(self) -> None:
        """Writes the token budgets that workers found into the models' records."""
        for model in self._plan.models:
            counts = self._total.models.get(model.model_id)
            if counts is not None and counts.tokens_per_batch:
                keep_tokens_per_batch(self._layout, model, counts.tokens_per_batch)

    def tokens(self) -> dict[str, int]:
        return {alias: counts.n_tokens for alias, counts in self._total.models.items()}

    def backlog(self, offset: Any) -> int:
        return rows_behind(self._spark, self._plan.instances_uri, offset)


@dataclasses.dataclass
class _BatchHistory:
    """Whether the next micro-batch may be a replay, or may already have been scored by another query.

    Attributes:
        version: version of `instances` at the query's latest start.
        may_be_replay: an earlier run may have begun the next micro-batch; only true of the first one after a start.
        may_be_known: another query may have scored or rejected rows of the next micro-batch.
    """

    version: int = 0
    may_be_replay: bool = True
    may_be_known: bool = True

    def begin(self, version: int) -> None:
        """Notes that the query starts, and the version of `instances`."""
        self.version, self.may_be_replay, self.may_be_known = version, True, True

    def update(self, checkpoint_uri: str, batch_id: int) -> None:
        """Sets `may_be_known` for a micro-batch, which begins where the previous micro-batch ended."""
        self.may_be_known = self.may_be_known and is_behind(end_offset(checkpoint_uri, batch_id - 1), self.version)


def pool(instances: "DataFrame") -> "DataFrame":
    """The rows of `instances` that are scored, with the scorers' columns and the columns written with each score.

    Args:
        instances: rows of the table `instances`.
    """
    renamed = instances.where("split = 'pool'").withColumnsRenamed(
        {"n_bytes": "text_bytes", "batch_id": "instance_batch_id"}
    )
    return renamed.select(*_SCORED_COLUMNS, *_CARRIED)


def _log(batch_id: int, total: ScoreCounts) -> None:
    for alias, counts in sorted(total.models.items()):
        LOGGER.info(
            "score: micro-batch %d, %s: %d instances, %d failed, %d tokens, %s tokens/s",
            batch_id, alias, counts.n_scored, counts.n_failed, counts.n_tokens, counts.tokens_per_second,
        )  # fmt: skip


def score_batch(
    plan: ScoringPlan, query_id: str, batch: "DataFrame", batch_id: int, accumulator: "Accumulator[ScoreCounts]",
    may_be_replay: bool = True, may_be_known: bool = True,
) -> ScoreCounts:  # fmt: skip
    """Scores the missing rows of a micro-batch, commits them once, and rejects rows that could not be scored.

    The text is read once, by the tasks that score it and write the scores.

    Args:
        plan: models and tables.
        query_id: id of the query; with `batch_id` it names the commit.
        batch: rows of `pool`.
        batch_id: number of the micro-batch.
        accumulator: the query's counts (`new_score_counts`); set to 0 first.
        may_be_replay: whether an earlier run may have begun this micro-batch.
        may_be_known: whether another query may have scored or rejected rows of this micro-batch; if so, its ids are
            read first.

    Returns:
        Counts of what was scored; empty for a replay, and if nothing was missing.
    """
    spark = batch.sparkSession
    accumulator.value = ScoreCounts()
    known = _known(plan, query_id, batch) if may_be_known else None

    def committed() -> "DataFrame":
        return _committed(spark, plan, query_id, batch_id)

    try:
        failures_unknown = may_be_replay and not committed().isEmpty()
        if not failures_unknown:
            _score(plan, batch, known, query_id, batch_id, accumulator)
            # Delta drops a second write under these ids, even if the first had only failures and wrote no row.
            failures_unknown = may_be_replay and committed().isEmpty()
        counts = accumulator.value
        done = committed() if known is None else committed().unionAll(known)
        if failures_unknown or len(counts.failed) >= MAX_FAILED:
            # Reads the text of the batch again, because Spark prunes no column of a micro-batch.
            _reject(plan, batch.select("instance_id"), done, counts.failed, query_id, batch_id)
        elif counts.failed:
            ids = spark.createDataFrame(sorted({(row[0],) for row in counts.failed}), "instance_id string")
            _reject(plan, ids, done, counts.failed, query_id, batch_id)
        return counts
    finally:
        if known is not None:
            known.unpersist()


def _score(
    plan: ScoringPlan, batch: "DataFrame", known: "DataFrame | None", query_id: str, batch_id: int,
    accumulator: "Accumulator[ScoreCounts]",
) -> None:  # fmt: skip
    from pyspark.sql import functions as F

    from miniplm_udf.workers.arrow import score_arrow
    from miniplm_udf.workers.messages import SCORED_SCHEMA, ddl

    # A server needs no GPU here.
    workers_per_gpu = None if all(model.is_served for model in plan.models) else plan.workers_per_gpu
    scored = _for_workers(plan, batch, known).mapInArrow(
        score_arrow(plan.factories, _CARRIED, accumulator),
        ddl([*SCORED_SCHEMA, *(schemas.SCORES.arrow_schema().field(name) for name in _CARRIED)]),
        profile=scoring_profile(batch.sparkSession, workers_per_gpu, plan.split_model),
    )
    rows = _score_rows(plan, scored.where(F.col("reason").isNull()), query_id, batch_id)
    tables.append(rows, plan.scores_uri, schemas.SCORES, query_id, batch_id)


def _committed(spark: "SparkSession", plan: ScoringPlan, query_id: str, batch_id: int) -> "DataFrame":
    """(instance_id, model_revision) of the rows of `scores` that a micro-batch has committed so far."""
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri)
    own = (F.col("query_id") == query_id) & (F.col("batch_id") == batch_id)
    return scores.where(own).select("instance_id", "model_revision")


def _for_workers(plan: ScoringPlan, batch: "DataFrame", known: "DataFrame | None") -> "DataFrame":
    """The missing rows of a batch, with the aliases to score them with as `model_ids`, in one partition a scorer.

    The text is shuffled only for several scorers whose shares would be uneven because there are too few file parts.
    """
    from pyspark.sql import functions as F

    if known is None:
        all_aliases = F.array(*(F.lit(model.model_id) for model in plan.models))
        missing = batch.withColumn("model_ids", all_aliases)
        has_parts = batch.rdd.getNumPartitions() >= _PARTS_PER_WORKER * plan.workers
    else:
        missing, has_parts = _missing(plan, batch, known), False
    if plan.workers == 1 or has_parts:
        return missing.coalesce(plan.workers)
    return missing.repartition(plan.workers, "instance_id")


def _missing(plan: ScoringPlan, batch: "DataFrame", known: "DataFrame") -> "DataFrame":
    from pyspark.sql import functions as F

    done = known.groupBy("instance_id").agg(F.collect_set("model_revision").alias("done"))
    wanted = F.array(
        *(
            F.when(F.col("done").isNull() | ~F.array_contains("done", model.model_revision), F.lit(model.model_id))
            for model in plan.models
        )
    )
    todo = batch.join(done, "instance_id", "left").withColumn("model_ids", F.array_compact(wanted))
    return todo.where(F.size("model_ids") > 0).select(*batch.columns, "model_ids")


def _known(plan: ScoringPlan, query_id: str, batch: "DataFrame") -> "DataFrame | None":
    """(instance_id, model_revision) of the rows of a batch that other queries have scored or rejected; None for none.

    The frame is computed here and persisted (`unpersist` it): a write to `scores` whose plan also reads `scores` would
    conflict with another driver's write.
    """
    from pyspark.sql import functions as F

    spark = batch.sparkSession
    # This query's earlier rows belong to other instances; Delta does not open files that hold only these rows.
    scores = spark.read.format("delta").load(plan.scores_uri)
    scores = scores.where(F.col("model_revision").isin(plan.revisions) & (F.col("query_id") != query_id))
    rejects = spark.read.format("delta").load(plan.rejects_uri)
    rejects = rejects.where(F.col("stage").isin(plan.stages) & (F.col("query_id") != query_id))
    if scores.isEmpty() and rejects.isEmpty():
        return None
    ids = batch.select("instance_id", "instance_batch_id").persist()
    try:
        near = batch_range.condition(ids, plan.scores_uri, plan.instances_uri)
        rejected = rejects.select("instance_id", F.expr(f"substring(stage, {len(SCORE_STAGE) + 1}) AS model_revision"))
        others = scores.where(near).select("instance_id", "model_revision").unionAll(rejected)
        known = others.join(ids.select("instance_id"), "instance_id", "left_semi").persist()
        if known.count():
            return known
        known.unpersist()
        return None
    finally:
        ids.unpersist()


def _score_rows(plan: ScoringPlan, good: "DataFrame", query_id: str, batch_id: int) -> "DataFrame":
    from pyspark.sql import functions as F

    def fact_of_model(name: str) -> "Column":
        pairs = [F.lit(value) for model in plan.models for value in (model.model_id, getattr(model, name))]
        return F.create_map(*pairs)[F.col("model_id")]

    return (
        good.withColumns({name: fact_of_model(name) for name in _MODEL_COLUMNS})
        .withColumn("context_tokens", F.col("context_tokens").cast("bigint"))
        .withColumn("run_id", F.lit(plan.run_id))
        .withColumn("scored_at", F.current_timestamp())
        .withColumn("query_id", F.lit(query_id))
        .withColumn("batch_id", F.lit(batch_id).cast("bigint"))
        .select(*schemas.SCORES.column_names)
    )


def _reject(
    plan: ScoringPlan, ids: "DataFrame", done: "DataFrame", failures: list[FailedRow], query_id: str, batch_id: int
) -> None:
    """Rejects the (instance, model) pairs that are not in `done`, with the reason if this run knows it."""
    from pyspark.sql import functions as F

    spark = ids.sparkSession
    models = [(model.model_id, model.model_revision) for model in plan.models]
    pairs = ids.crossJoin(F.broadcast(spark.createDataFrame(models, "model_id string, model_revision string")))
    unscored = pairs.join(done, ["instance_id", "model_revision"], "left_anti")
    columns = "instance_id string, model_id string, reason string, detail string"
    reasons = spark.createDataFrame(failures, columns).dropDuplicates(["instance_id", "model_id"])
    unscored = unscored.join(reasons, ["instance_id", "model_id"], "left")
    stage = F.concat(F.lit(SCORE_STAGE), F.col("model_revision"))
    rows = unscored.withColumns({"stage": stage, "reason": F.coalesce("reason", F.lit("not_scored"))})
    rejections.append(rows, plan.rejects_uri, query_id, batch_id)


def totals(spark: "SparkSession", plan: ScoringPlan) -> dict[str, int]:
    """Counts the rows of `scores` by model revision.

    Args:
        spark: any session.
        plan: the models and the tables, which must exist.

    Returns:
        Rows by revision; a model without a row is left out.
    """
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    return {row[0]: row[1] for row in scores.groupBy("model_revision").count().collect()}


def n_rejected(spark: "SparkSession", plan: ScoringPlan) -> int:
    """Returns the number of rejected (instance, model) pairs of the plan's models.

    Args:
        spark: any session.
        plan: the models and the tables, which must exist.
    """
    from pyspark.sql import functions as F

    return int(spark.read.format("delta").load(plan.rejects_uri).where(F.col("stage").isin(plan.stages)).count())
