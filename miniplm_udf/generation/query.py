"""The query of the stage `generate`: pool instances -> `generations` and `rejects`. Driver only.

    instances (split = pool; the share `generate.sample`) -> rows still missing -> mapInArrow -> one append to
              `generations` -> `rejects`

A row is missing if neither `generations` nor `rejects` has it with this revision: one model, seed and settings. The
lease of the revision lets one driver at a time add such rows, and a micro-batch commits `generations` once, under its
(query_id, batch_id). So a job that was killed, a replayed micro-batch, a lost checkpoint and another share of the pool
generate nothing a second time.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ScoreConfig
from miniplm_udf.layout import Root
from miniplm_udf.schemas import GENERATE_STAGE
from miniplm_udf.scores.gpus import scoring_profile
from miniplm_udf.scores.instances import require_instances, stream_sample
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store import batch_range, rejections, tables
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.query import Query
from miniplm_udf.workers.score_counts import FailedRow, ScoreCounts, ScoreCountsParam
from miniplm_udf.workers.worker_scorers import TextGenerator

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.generate")

_REQUESTED = ("instance_id", "text", "segment_ends", "ends_document", "model_ids")
_CARRIED = ("source", "document_ids", "instance_batch_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """The model of a generation, its settings and its tables.

    Attributes:
        model: the model that continues.
        settings: lengths, sampling, seed and share of the pool.
        workers: concurrent generators, and how many share a GPU.
        factory: makes the generator.
        layout: the places of the tables.
        run_id: id of the command.
        split_model: alias of the model, if it is split over all GPUs of its process; else None.
    """

    model: ModelDescription
    settings: GenerateConfig
    workers: ScoreConfig
    factory: Callable[[], TextGenerator]
    layout: Root
    run_id: str
    split_model: str | None = None

    @property
    def revision(self) -> str:
        """Hash of the model and of the settings; rows with another revision are other texts."""
        return self.settings.revision(self.model.model_revision)

    @property
    def stage(self) -> str:
        """The value of the column `stage` of this generation's rows in `rejects`."""
        return GENERATE_STAGE + self.revision

    @property
    def checkpoint_uri(self) -> str:
        """Location of the checkpoint; each share of the pool has its own."""
        share = "" if self.settings.sample >= 1 else f"-{float(self.settings.sample)!r}"
        return self.layout.checkpoint(f"generate-{self.revision}{share}")


class GenerationQuery(Query):
    """The query that generates; makes the empty tables `generations` and `rejects` if there are none.

    Args:
        spark: a session.
        plan: model, settings and tables.
        total: gets the counts of every micro-batch added, without the failed rows.

    Raises:
        CorpusError: there is no table of instances.
    """

    def __init__(self, spark: "SparkSession", plan: GenerationPlan, total: ScoreCounts) -> None:
        self._instances_uri, self._uri, self._rejects_uri = (
            plan.layout.table(name) for name in ("instances", "generations", "rejects")
        )
        require_instances(spark, self._instances_uri, "continue")
        batch_range.create(spark, self._uri, schemas.GENERATIONS, self._instances_uri)
        tables.create(spark, self._rejects_uri, schemas.REJECTS)
        facts = QueryFacts(
            stage="generate", lease=f"generate-{plan.revision}", source="instances", sample=plan.settings.sample,
            revisions={plan.model.model_id: plan.model.model_revision, "generation": plan.revision},
        )  # fmt: skip
        super().__init__("generate", facts, plan.checkpoint_uri)
        self._spark, self._plan, self._total = spark, plan, total
        self._accumulator = spark.sparkContext.accumulator(ScoreCounts(), ScoreCountsParam())

    def source(self) -> "DataFrame":
        settings = self._plan.settings
        rows = stream_sample(self._spark, self._instances_uri, settings.sample, settings.max_bytes_per_trigger)
        rows = rows.where("split = 'pool'").withColumnRenamed("batch_id", "instance_batch_id")
        return rows.select(*(name for name in _REQUESTED if name != "model_ids"), *_CARRIED)

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        ids = batch.select("instance_id", "instance_batch_id").persist()
        known = self._known(ids).persist()
        self._accumulator.value = ScoreCounts()
        try:
            if ids.count() > known.count():
                self._generate(batch, known, query_id, batch_id)
                self._reject(ids, self._accumulator.value.failed, query_id, batch_id)
        finally:
            known.unpersist()
            ids.unpersist()
        for uri in (self._uri, self._rejects_uri):
            tables.compact(self._spark, uri, batch_id)
        counts = self._accumulator.value.of(self._plan.model.model_id)
        LOGGER.info(
            "generate: micro-batch %d: %d instances, %d failed, %d new tokens, %s tokens/s",
            batch_id, counts.n_scored, counts.n_failed, counts.n_tokens, counts.tokens_per_second,
        )  # fmt: skip
        # Without the failed rows, which are in the table `rejects` now.
        self._total.add(dataclasses.replace(self._accumulator.value, failed=[]))

    def tokens(self) -> dict[str, int]:
        return {alias: counts.n_tokens for alias, counts in self._total.models.items()}

    def backlog(self, offset: Any) -> int:
        return rows_behind(self._spark, self._instances_uri, offset)

    def _known(self, ids: "DataFrame") -> "DataFrame":
        """The ids whose instances were continued or rejected with this revision."""
        from pyspark.sql import functions as F

        done = tables.read(self._spark, self._uri).where(F.col("generation_revision") == self._plan.revision)
        done = done.where(batch_range.condition(ids, self._uri, self._instances_uri))
        rejected = tables.read(self._spark, self._rejects_uri).where(F.col("stage") == self._plan.stage)
        known = done.select("instance_id").unionAll(rejected.select("instance_id"))
        return ids.select("instance_id").join(known, "instance_id", "left_semi")

    def _generate(self, batch: "DataFrame", known: "DataFrame", query_id: str, batch_id: int) -> None:
        """Continues the rows of a micro-batch that are not known, and commits them once."""
        from pyspark.sql import functions as F

        from miniplm_udf.workers.arrow import score_arrow
        from miniplm_udf.workers.messages import GENERATED_SCHEMA, ddl

        plan = self._plan
        missing = tables.missing_from(batch, known)
        missing = missing.withColumn("model_ids", F.array(F.lit(plan.model.model_id)))
        # Generation takes far longer than a shuffle, so the rows are spread evenly over the workers.
        missing = missing.coalesce(1) if plan.workers.workers == 1 else missing.repartition(plan.workers.workers)
        generated = missing.select(*_REQUESTED, *_CARRIED).mapInArrow(
            score_arrow({plan.model.model_id: plan.factory}, _CARRIED, self._accumulator, GENERATED_SCHEMA),
            ddl([*GENERATED_SCHEMA, *(schemas.GENERATIONS.arrow_schema().field(name) for name in _CARRIED)]),
            profile=scoring_profile(self._spark, plan.workers.workers_per_gpu, plan.split_model),
        )
        rows = generated.where(F.col("reason").isNull()).withColumns(
            {
                "generation_revision": F.lit(plan.revision),
                "model_revision": F.lit(plan.model.model_revision),
                "tokenizer_hash": F.lit(plan.model.tokenizer_hash),
                "seed": F.lit(plan.settings.seed).cast("bigint"),
                "run_id": F.lit(plan.run_id),
                "generated_at": F.current_timestamp(),
                "query_id": F.lit(query_id),
                "batch_id": F.lit(batch_id).cast("bigint"),
            }
        )
        tables.append(
            rows.select(*schemas.GENERATIONS.column_names), self._uri, schemas.GENERATIONS, query_id, batch_id
        )

    def _reject(self, ids: "DataFrame", failures: list[FailedRow], query_id: str, batch_id: int) -> None:
        """Rejects the rows that have no generation now, with the reason if this run knows it."""
        from pyspark.sql import functions as F

        columns = "instance_id string, model_id string, reason string, detail string"
        reasons = self._spark.createDataFrame(failures, columns).dropDuplicates(["instance_id"])
        failed = tables.missing_from(ids, self._known(ids)).join(reasons.drop("model_id"), "instance_id", "left")
        failed = failed.withColumns(
            {"stage": F.lit(self._plan.stage), "reason": F.coalesce("reason", F.lit("not_generated"))}
        )
        rejections.append(failed, self._rejects_uri, query_id, batch_id)
