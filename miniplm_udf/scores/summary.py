"""The summary of `miniplm score`, from the tables and the counts of the run. Driver only; a rerun counts again."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import CorpusError
from miniplm_udf.scores.query import ScoringPlan, n_rejected, totals
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store import tables
from miniplm_udf.workers.score_counts import ModelCounts, ScoreCounts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """The result of `miniplm score`.

    Attributes:
        scored: rows of `scores`, by alias.
        new_scored: rows that this run has scored, by alias.
        rejected: rejected (instance, model) pairs.
        tokens: tokens that this run has scored, by alias.
        tokens_per_second: tokens per second of a scorer's working time, by alias; None where nothing was scored.
        wait_share: share of time in which no model worked; None if no task had a second slice.
        seconds: duration of the run.
        matrix_rows: rows of `score_matrix`.
        too_many_rejects: whether rejects exceed `score.max_reject_share`.
    """

    scored: dict[str, int]
    new_scored: dict[str, int]
    rejected: int
    tokens: dict[str, int]
    tokens_per_second: dict[str, float | None]
    wait_share: float | None
    seconds: float
    matrix_rows: int
    too_many_rejects: bool


def summarize(
    spark: "SparkSession", config: ExperimentConfig, plan: ScoringPlan, descriptions: Mapping[str, ModelDescription],
    total: ScoreCounts, seconds: float,
) -> ScoreSummary:  # fmt: skip
    """Returns the summary of a run of the scoring queries.

    Args:
        spark: a session.
        config: the experiment.
        plan: the plan of the scoring query.
        descriptions: the configured models, by alias.
        total: counts of the run.
        seconds: duration of the run.

    Raises:
        CorpusError: a model has scored nothing at all, and no more rows will come (`stream.trigger: available_now`).
    """
    by_revision = totals(spark, plan)
    scored = {alias: by_revision.get(model.model_revision, 0) for alias, model in descriptions.items()}
    rejected = n_rejected(spark, plan)
    if not all(scored.values()) and config.stream.trigger == "available_now":
        raise CorpusError(
            f"scores: expected scored instances of the split `pool` for every model, found {scored} and {rejected} "
            "rejects; check the table rejects, and whether ingest.split and score.sample leave any instances to score"
        )
    counts = {alias: total.models.get(alias, ModelCounts()) for alias in scored}
    matrix_uri = config.layout.table("score_matrix")
    return ScoreSummary(
        scored=scored,
        new_scored={alias: counts[alias].n_scored for alias in scored},
        rejected=rejected,
        tokens={alias: counts[alias].n_tokens for alias in scored},
        tokens_per_second={alias: counts[alias].tokens_per_second for alias in scored},
        wait_share=total.wait_share,
        seconds=round(seconds, 3),
        matrix_rows=tables.read(spark, matrix_uri).count() if tables.exists(spark, matrix_uri) else 0,
        too_many_rejects=rejected > config.score.max_reject_share * (rejected + sum(by_revision.values())),
    )
