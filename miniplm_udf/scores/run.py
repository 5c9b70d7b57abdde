"""Prepares the score stage: the models of an experiment and the two queries that score with them. Driver only.

Input: `instances` and the configured models; output: the queries (query.py scores, matrix.py keeps `score_matrix`).
Starts no query: `jobs/score.py` and `jobs/stream.py` do. Preparing again after a kill describes the models again and
continues the same checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.scores import matrix
from miniplm_udf.scores import query as scores
from miniplm_udf.scores.models import describe_models, kept_tokens_per_batch, model_configs
from miniplm_udf.scores.plan import ScorerFactory, ScoringPlan
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.streams.query import Query
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from miniplm_udf.workers.score_counts import ScoreCounts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The two queries of the score stage, and the models that they score with.

    Attributes:
        plan: what is scored, and where the rows go.
        descriptions: the models by alias.
        total: counts of all workers; it grows while the queries run.
        scoring: the query that writes `scores`.
        keeping: the query that writes `score_matrix`.
    """

    plan: ScoringPlan
    descriptions: dict[str, ModelDescription]
    total: ScoreCounts
    scoring: Query
    keeping: Query


def prepare(
    spark: "SparkSession", config: ExperimentConfig, run_id: str, factories: Mapping[str, ScorerFactory] | None = None
) -> Scoring:
    """Describes the models and makes the queries; starts none.

    Args:
        spark: the session.
        config: the experiment.
        run_id: id of the command, written with each score.
        factories: makers of scorers by alias, used instead of the models'.

    Returns:
        The queries and what they score with.

    Raises:
        CorpusError: there is no table of instances.
        ModelLoadError: a model is missing, or cannot be scored with.
    """
    models = model_configs(config)
    descriptions = describe_models(spark, config, models)
    split_model = next((alias for alias, model in models.items() if model.device_map is not None), None)
    if factories is None:
        factories = {
            alias: ModelScorerFactory(
                models[alias],
                description,
                config.score,
                takes_all_gpus=split_model is not None,
                kept=kept_tokens_per_batch(config.layout, description),
            )
            for alias, description in descriptions.items()
        }
    plan = ScoringPlan(
        models=scores.distinct_revisions(descriptions),
        factories=factories,
        instances_uri=config.layout.table("instances"),
        scores_uri=config.layout.table("scores"),
        rejects_uri=config.layout.table("rejects"),
        workers=config.score.workers,
        workers_per_gpu=config.score.workers_per_gpu,
        run_id=run_id,
        split_model=split_model,
    )
    revisions = {alias: description.model_revision for alias, description in descriptions.items()}
    total = ScoreCounts()
    checkpoint = config.layout.checkpoint(scores.checkpoint_name(plan.models, config.score.sample))
    matrix_checkpoint = config.layout.checkpoint(matrix.checkpoint_name(revisions))
    scoring = scores.ScoringQuery(spark, plan, config.layout, checkpoint, config.score, total)
    pool_share = 1 - config.ingest.split.reference - config.ingest.split.heldout
    scoring.outputs_per_row = len(plan.models) * pool_share * config.score.sample
    return Scoring(
        plan,
        descriptions,
        total,
        scoring,
        matrix.MatrixQuery(spark, revisions, config.layout, matrix_checkpoint, config.score),
    )
