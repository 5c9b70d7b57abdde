"""The micro-batches of the score job: pool instances -> `scores` and `rejects`. Driver only; models run in `udf.py`.

    instances (split = pool; `score.sample` of it) -> rows still missing, per model -> mapInArrow
              -> one append to scores -> rejects

Scores only what is missing: what another query has scored or rejected (a lost checkpoint, another set of models) is
looked for until the instances that were there at the start are through; a model is scored by one driver at a time, so
of later ones there can be none. A look opens what came with the micro-batch's instances (`nearby`), no whole table. A
micro-batch commits `scores` once, under its (query_id, batch_id); everything else is derived from the committed rows.
A replayed micro-batch finds its rows and skips scoring; killed before its commit, it scores again and nothing of the
first try remains.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from miniplm_udf import nearby, schemas, tables
from miniplm_udf.config import ScoreConfig, fingerprint
from miniplm_udf.errors import CorpusError
from miniplm_udf.resources import scoring_profile
from miniplm_udf.rules import in_sample
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.offsets import end_offset, is_behind
from miniplm_udf.streams.query import Query
from miniplm_udf.udf import SCORED_DDL, ScorerLike, score_arrow
from miniplm_udf.workers.tally import MAX_FAILED, Failed, Tally, TallyParam

if TYPE_CHECKING:
    from pyspark import Accumulator
    from pyspark.sql import Column, DataFrame, SparkSession

Factory = Callable[[], ScorerLike]

LOGGER = logging.getLogger("miniplm.score")

_STAGE = "score:"
# With so many parts of files for each scorer, no scorer has a quarter more than another.
_PARTS_PER_WORKER = 4
_SCORED_COLUMNS = ("instance_id", "text", "segment_ends", "ends_document")
# Of the instance, written beside each score: `score_matrix` needs them, and must not read `instances` for them.
_CARRIED = {
    "source": "string",
    "split": "string",
    "content_hash": "string",
    "text_bytes": "bigint",
    "instance_batch_id": "bigint",
}
_MODEL_COLUMNS = ("model_revision", "tokenizer_hash", "dtype", "context_tokens")
_SCORED_DDL = ", ".join([SCORED_DDL, *(f"{name} {kind}" for name, kind in _CARRIED.items())])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What to score with, and where the rows go.

    Attributes:
        models: one of each revision; two aliases of one model are scored once, under the first.
        factories: makers of their scorers, by alias.
        workers: concurrent scorers; `workers_per_gpu` of them may share one.
        run_id: the command that scores.
    """

    models: tuple[ModelDescription, ...]
    factories: Mapping[str, Factory]
    instances_uri: str
    scores_uri: str
    rejects_uri: str
    workers: int
    workers_per_gpu: int | None
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


def checkpoint_name(models: tuple[ModelDescription, ...], sample: float = 1.0) -> str:
    """A set of models has its own query, and so has each share of the pool: another one looks at every instance again,
    and scores what is missing. The name tells the share (`Checkpoint.sample`)."""
    name = "score-" + fingerprint(sorted(model.model_revision for model in models))
    return name if sample >= 1 else f"{name}-{float(sample)!r}"


def new_tally(spark: "SparkSession") -> "Accumulator[Tally]":
    """Where the workers of a query leave their counts. One a query: Spark keeps an accumulator for ever."""
    return spark.sparkContext.accumulator(Tally(), TallyParam())


def scoring_query(
    spark: "SparkSession", plan: ScoringPlan, checkpoint_uri: str, config: ScoreConfig, total: Tally
) -> Query:
    """The query that scores. `total` grows with every micro-batch.

    Raises:
        CorpusError: there is no table of instances.
    """
    if not tables.exists(spark, plan.instances_uri):
        raise CorpusError(
            f"table {plan.instances_uri}: expected instances to score, found no table; run `miniplm ingest` first"
        )
    nearby.create_scores(spark, plan.scores_uri, plan.instances_uri)
    tables.create(spark, plan.rejects_uri, schemas.REJECTS)
    tally = new_tally(spark)
    start = _Start()

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        start.look(checkpoint_uri, batch_id)
        found = score_batch(plan, query_id, batch, batch_id, tally, start.may_be_replay, start.may_be_known)
        start.may_be_replay = False
        for uri in (plan.scores_uri, plan.rejects_uri):
            tables.compact(spark, uri, batch_id)
        _log(batch_id, found)
        # Without the failures, which are in the table now.
        total.add(dataclasses.replace(found, failed=[]))

    def source() -> "DataFrame":
        # With the lease in hand: what comes into the table from now on, no other query can have scored.
        start.begin(tables.version(spark, plan.instances_uri) or 0)
        reader = spark.readStream.format("delta").option("maxBytesPerTrigger", config.max_bytes_per_trigger)
        # Only a take-down changes rows that are there.
        instances = reader.option("skipChangeCommits", "true").load(plan.instances_uri)
        return pool(instances.where(in_sample(config.sample)))

    return Query(
        name="score",
        lease=checkpoint_name(plan.models, config.sample),
        # Of two sets of models, those that they share would be scored twice.
        also=tuple(f"model-{revision}" for revision in plan.revisions),
        checkpoint_uri=checkpoint_uri,
        source=source,
        micro_batch=micro_batch,
        tokens=lambda: {alias: counts.n_tokens for alias, counts in total.models.items()},
        backlog=lambda offset: rows_behind(spark, plan.instances_uri, offset),
        backlog_unit="rows" if config.sample >= 1 else f"rows to draw {config.sample:g} of",
    )


@dataclasses.dataclass
class _Start:
    """What can be of the next micro-batch, by what has passed since the query's newest start.

    Attributes:
        version: of `instances` at the start.
        may_be_replay: an earlier run can have begun it: true of the first one alone.
        may_be_known: another query can have scored or rejected some of it.
    """

    version: int = 0
    may_be_replay: bool = True
    may_be_known: bool = True

    def begin(self, version: int) -> None:
        self.version, self.may_be_replay, self.may_be_known = version, True, True

    def look(self, checkpoint_uri: str, batch_id: int) -> None:
        """Where the one before ended, this one begins."""
        self.may_be_known = self.may_be_known and is_behind(end_offset(checkpoint_uri, batch_id - 1), self.version)


def pool(instances: "DataFrame") -> "DataFrame":
    """What is scored of `instances`, and what of it stands beside each score."""
    renamed = instances.where("split = 'pool'").withColumnsRenamed(
        {"n_bytes": "text_bytes", "batch_id": "instance_batch_id"}
    )
    return renamed.select(*_SCORED_COLUMNS, *_CARRIED)


def _log(batch_id: int, found: Tally) -> None:
    for alias, counts in sorted(found.models.items()):
        LOGGER.info(
            "score: micro-batch %d, %s: %d instances, %d failed, %d tokens, %s tokens/s",
            batch_id, alias, counts.n_scored, counts.n_failed, counts.n_tokens, counts.tokens_per_second,
        )  # fmt: skip


def score_batch(
    plan: ScoringPlan, query_id: str, batch: "DataFrame", batch_id: int, tally: "Accumulator[Tally]",
    may_be_replay: bool = True, may_be_known: bool = True,
) -> Tally:  # fmt: skip
    """Scores what is missing of a micro-batch, commits it once, and rejects what could not be scored.

    One pass: the text is read once, by the tasks that score it and write the scores.

    Args:
        batch: of `pool`.
        tally: of the query (`new_tally`).
        may_be_replay: whether an earlier run can have begun this micro-batch.
        may_be_known: whether another query can have scored or rejected some of it. Then its ids are read first.

    Returns:
        What was scored; empty for a replay and where nothing was missing.
    """
    spark = batch.sparkSession
    tally.value = Tally()
    known = _known(plan, query_id, batch) if may_be_known else None

    def committed() -> "DataFrame":
        return _committed(spark, plan, query_id, batch_id)

    try:
        unknown = may_be_replay and not committed().isEmpty()
        if not unknown:
            _score(plan, batch, known, query_id, batch_id, tally)
            # Delta drops a second write under these ids unread, also where the first had failures only, so no row.
            unknown = may_be_replay and committed().isEmpty()
        found = tally.value
        done = committed() if known is None else committed().unionAll(known)
        if unknown or len(found.failed) >= MAX_FAILED:
            # Reads the text of the batch again: Spark leaves no column of a micro-batch out.
            _reject(plan, batch.select("instance_id"), done, found.failed, query_id, batch_id)
        elif found.failed:
            ids = spark.createDataFrame(sorted({(one[0],) for one in found.failed}), "instance_id string")
            _reject(plan, ids, done, found.failed, query_id, batch_id)
        return found
    finally:
        if known is not None:
            known.unpersist()


def _score(
    plan: ScoringPlan, batch: "DataFrame", known: "DataFrame | None", query_id: str, batch_id: int,
    tally: "Accumulator[Tally]",
) -> None:  # fmt: skip
    from pyspark.sql import functions as F

    scored = _for_workers(plan, batch, known).mapInArrow(
        score_arrow(plan.factories, list(_CARRIED), tally),
        _SCORED_DDL,
        profile=scoring_profile(batch.sparkSession, plan.workers_per_gpu),
    )
    rows = _score_rows(plan, scored.where(F.col("reason").isNull()), query_id, batch_id)
    tables.append(rows, plan.scores_uri, schemas.SCORES, query_id, batch_id)


def _committed(spark: "SparkSession", plan: ScoringPlan, query_id: str, batch_id: int) -> "DataFrame":
    """(instance_id, model_revision) of what stands in `scores` of a micro-batch by now."""
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri)
    own = (F.col("query_id") == query_id) & (F.col("batch_id") == batch_id)
    return scores.where(own).select("instance_id", "model_revision")


def _for_workers(plan: ScoringPlan, batch: "DataFrame", known: "DataFrame | None") -> "DataFrame":
    """What is missing of a batch, with the aliases of its models as `model_ids`, in as many partitions as scorers.

    One needs no shuffle of the text, nor do several where the files have parts enough for shares that are nearly even.
    """
    from pyspark.sql import functions as F

    if known is None:
        every = F.array(*(F.lit(model.model_id) for model in plan.models))
        missing = batch.withColumn("model_ids", every)
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
    """(instance_id, model_revision) of what other queries have scored or rejected of a batch; None where there is none.

    It is computed here and kept (`unpersist` it): a write to `scores` whose plan still read `scores` would be in
    conflict with another driver's.
    """
    from pyspark.sql import functions as F

    spark = batch.sparkSession
    # What this query wrote in earlier micro-batches is of other instances: files of it alone are not even opened.
    scores = spark.read.format("delta").load(plan.scores_uri)
    scores = scores.where(F.col("model_revision").isin(plan.revisions) & (F.col("query_id") != query_id))
    rejects = spark.read.format("delta").load(plan.rejects_uri)
    rejects = rejects.where(F.col("stage").isin(plan.stages) & (F.col("query_id") != query_id))
    if scores.isEmpty() and rejects.isEmpty():
        return None
    ids = batch.select("instance_id", "instance_batch_id").persist()
    try:
        near = nearby.condition(ids, plan.scores_uri, plan.instances_uri)
        rejected = rejects.select("instance_id", F.expr(f"substring(stage, {len(_STAGE) + 1}) AS model_revision"))
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

    def of_model(name: str) -> "Column":
        pairs = [F.lit(value) for model in plan.models for value in (model.model_id, getattr(model, name))]
        return F.create_map(*pairs)[F.col("model_id")]

    return (
        good.withColumns({name: of_model(name) for name in _MODEL_COLUMNS})
        .withColumn("context_tokens", F.col("context_tokens").cast("bigint"))
        .withColumn("run_id", F.lit(plan.run_id))
        .withColumn("scored_at", F.current_timestamp())
        .withColumn("query_id", F.lit(query_id))
        .withColumn("batch_id", F.lit(batch_id).cast("bigint"))
        .select(*schemas.SCORES.column_names)
    )


def _reject(
    plan: ScoringPlan, ids: "DataFrame", done: "DataFrame", failures: list[Failed], query_id: str, batch_id: int
) -> None:
    """Rejects the (instance, model) pairs that are not `done`; the reason where this run still knows it."""
    from pyspark.sql import functions as F

    spark = ids.sparkSession
    models = [(model.model_id, model.model_revision) for model in plan.models]
    pairs = ids.crossJoin(F.broadcast(spark.createDataFrame(models, "model_id string, model_revision string")))
    unscored = pairs.join(done, ["instance_id", "model_revision"], "left_anti")
    columns = "instance_id string, model_id string, reason string, detail string"
    reasons = spark.createDataFrame(failures, columns).dropDuplicates(["instance_id", "model_id"])
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
    ).persist()
    try:
        # A replay that made them already is told by Delta, from (query_id, batch_id).
        if not rows.isEmpty():
            tables.append(rows, plan.rejects_uri, schemas.REJECTS, query_id, batch_id)
    finally:
        rows.unpersist()


def totals(spark: "SparkSession", plan: ScoringPlan) -> dict[str, int]:
    """Rows of `scores` by model revision."""
    from pyspark.sql import functions as F

    scores = spark.read.format("delta").load(plan.scores_uri).where(F.col("model_revision").isin(plan.revisions))
    return {row[0]: row[1] for row in scores.groupBy("model_revision").count().collect()}


def n_rejected(spark: "SparkSession", plan: ScoringPlan) -> int:
    """Rejected (instance, model) pairs of the plan's models."""
    from pyspark.sql import functions as F

    return int(spark.read.format("delta").load(plan.rejects_uri).where(F.col("stage").isin(plan.stages)).count())
