"""`miniplm score`: instances -> scores -> score_matrix, with every configured model.

Reads `instances` (split = pool), appends to `scores` and `rejects`, keeps `score_matrix` up to date; writes the models'
records `<root>/models/<alias>.json`. Two Structured Streaming queries with checkpoints under `<root>/_checkpoints/`;
what is scored already, with the same weights and settings, is never scored again. A rerun goes on after a kill.

    miniplm score -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/score.py -c conf/demo.yaml
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import new_run_id, stage_main
from miniplm_udf import matrix, scores, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.model_records import describe_models, model_configs
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streams.query import Query
from miniplm_udf.streams.runner import QueryRunner
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from miniplm_udf.workers.tally import ModelCounts, Tally

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The two queries, and what they score with. `total` grows as they run."""

    plan: scores.ScoringPlan
    descriptions: dict[str, ModelDescription]
    total: Tally
    scoring: Query
    keeping: Query


def prepare(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, scores.Factory] | None = None
) -> Scoring:
    """Describes the models and makes the queries; starts none.

    Args:
        factories: makers of scorers by alias, instead of the models' own.

    Raises:
        CorpusError: there is no table of instances.
        ModelLoadError: a model that is not there, or cannot be scored with.
    """
    models = model_configs(config)
    descriptions = describe_models(spark, config, models)
    if factories is None:
        factories = {alias: ModelScorerFactory(models[alias], descriptions[alias], config.score) for alias in models}
    plan = scores.ScoringPlan(
        models=scores.distinct_revisions(descriptions),
        factories=factories,
        instances_uri=config.table_uri("instances"),
        scores_uri=config.table_uri("scores"),
        rejects_uri=config.table_uri("rejects"),
        workers=config.score.workers,
        workers_per_gpu=config.score.workers_per_gpu,
        run_id=new_run_id(),
    )
    revisions = {alias: description.model_revision for alias, description in descriptions.items()}
    total = Tally()
    checkpoint = config.checkpoint_uri(scores.checkpoint_name(plan.models, config.score.sample))
    matrix_checkpoint = config.checkpoint_uri(matrix.checkpoint_name(revisions))
    return Scoring(
        plan,
        descriptions,
        total,
        scores.scoring_query(spark, plan, checkpoint, config.score, total),
        matrix.matrix_query(spark, revisions, config.table_uri(""), matrix_checkpoint, config.score),
    )


def run(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, scores.Factory] | None = None
) -> dict[str, Any]:
    """Scores the pool and brings the matrix up to date; with processing_time, until it is asked to stop.

    Args:
        factories: makers of scorers by alias, instead of the models' own.

    Returns:
        Counts by alias (rows in all, new rows and tokens, tokens per second), `wait_share`, rejects, matrix rows.

    Raises:
        CorpusError: there is nothing to score, or a model scored nothing at all.
    """
    start = time.monotonic()
    prepared = prepare(spark, config, factories)
    runner = QueryRunner(spark, config.root, config.stream)
    if config.stream.trigger == "available_now":
        # One after the other: the end of what is there is the end of what was scored.
        runner.run([prepared.scoring])
        runner.run([prepared.keeping])
    else:
        runner.run([prepared.scoring, prepared.keeping])
    return summary(spark, config, prepared, time.monotonic() - start)


def summary(spark: "SparkSession", config: ExperimentConfig, prepared: Scoring, seconds: float) -> dict[str, Any]:
    """What `run` returns.

    Raises:
        CorpusError: a model scored nothing at all, and no more is to come.
    """
    by_revision = scores.totals(spark, prepared.plan)
    scored = {alias: by_revision.get(model.model_revision, 0) for alias, model in prepared.descriptions.items()}
    rejected = scores.n_rejected(spark, prepared.plan)
    if not all(scored.values()) and config.stream.trigger == "available_now":
        raise CorpusError(
            f"scores: expected scored instances of the split `pool` for every model, found {scored} and {rejected} "
            "rejects; see the table rejects, and whether ingest.split leaves a pool, and score.sample some of it"
        )
    counts = {alias: prepared.total.models.get(alias, ModelCounts()) for alias in scored}
    matrix_uri = config.table_uri("score_matrix")
    return {
        "scored": scored,
        "new_scored": {alias: counts[alias].n_scored for alias in scored},
        "rejected": rejected,
        "tokens": {alias: counts[alias].n_tokens for alias in scored},
        "tokens_per_second": {alias: counts[alias].tokens_per_second for alias in scored},
        "wait_share": prepared.total.wait_share,
        "seconds": round(seconds, 3),
        "matrix_rows": tables.read(spark, matrix_uri).count() if tables.exists(spark, matrix_uri) else 0,
        "too_many_rejects": rejected > config.score.max_reject_share * (rejected + sum(by_revision.values())),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("score", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
