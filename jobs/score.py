"""`miniplm score`: instances -> scores -> score_matrix, with every configured model.

Reads `instances` (split = pool), appends to `scores` and `rejects`, keeps `score_matrix` up to date; writes the models'
records `<root>/models/<alias>.json`. Two Structured Streaming queries with checkpoints under `<root>/_checkpoints/`;
what is scored already, with the same weights and settings, is never scored again. A rerun goes on after a kill.

    miniplm score -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/score.py -c conf/demo.yaml
"""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import new_run_id, stage_main
from miniplm_udf import matrix, scores
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.model_records import describe_models, model_configs
from miniplm_udf.model_scorers import ModelScorerFactory
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streaming import wait_for_all
from miniplm_udf.tally import ModelCounts, Tally

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, scores.Factory] | None = None
) -> dict[str, Any]:
    """Scores the pool and brings the matrix up to date.

    Args:
        factories: makers of scorers by alias, instead of the models' own.

    Returns:
        Counts by alias (rows in all, new rows and tokens, tokens per second), `wait_share`, rejects, matrix rows.

    Raises:
        CorpusError: there is nothing to score, or a model scored nothing at all.
    """
    start = time.monotonic()
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
        run_id=new_run_id(),
    )
    revisions = {alias: description.model_revision for alias, description in descriptions.items()}
    total = Tally()
    checkpoint = config.checkpoint_uri(scores.checkpoint_name(plan.models))
    scoring = scores.start_scoring(spark, plan, checkpoint, config.score, total)
    if config.score.trigger == "available_now":
        wait_for_all([scoring])
    matrix_checkpoint = config.checkpoint_uri(matrix.checkpoint_name(revisions))
    keeping = matrix.start_matrix(spark, revisions, config.table_uri(""), matrix_checkpoint, config.score)
    wait_for_all([scoring, keeping])
    return _summary(spark, config, plan, descriptions, total, time.monotonic() - start)


def _summary(
    spark: "SparkSession", config: ExperimentConfig, plan: scores.ScoringPlan,
    descriptions: dict[str, ModelDescription], total: Tally, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    by_revision = scores.totals(spark, plan)
    scored = {alias: by_revision.get(model.model_revision, 0) for alias, model in descriptions.items()}
    rejected = scores.n_rejected(spark, plan)
    if not all(scored.values()):
        raise CorpusError(
            f"scores: expected scored instances of the split `pool` for every model, found {scored} and {rejected} "
            "rejects; see the table rejects, and whether ingest.split leaves a pool"
        )
    counts = {alias: total.models.get(alias, ModelCounts()) for alias in scored}
    return {
        "scored": scored,
        "new_scored": {alias: counts[alias].n_scored for alias in scored},
        "rejected": rejected,
        "tokens": {alias: counts[alias].n_tokens for alias in scored},
        "tokens_per_second": {alias: counts[alias].tokens_per_second for alias in scored},
        "wait_share": total.wait_share,
        "seconds": round(seconds, 3),
        "matrix_rows": spark.read.format("delta").load(config.table_uri("score_matrix")).count(),
        "too_many_rejects": rejected > config.score.max_reject_share * (rejected + sum(by_revision.values())),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("score", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
