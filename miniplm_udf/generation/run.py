"""Prepares the stage `generate`, and sums up what it did. Driver only; starts no query (`jobs/generate.py` does).

Input: the experiment, with the section `generate`. Output: the query and, after it has run, a `GenerationSummary`.
Preparing again after a kill describes the model again and continues the same checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.generation.query import GenerationPlan, GenerationQuery
from miniplm_udf.scores.models import describe_models
from miniplm_udf.scoring.description import with_absolute_path
from miniplm_udf.store import tables
from miniplm_udf.workers.model_scorers import ModelGeneratorFactory
from miniplm_udf.workers.score_counts import ScoreCounts
from miniplm_udf.workers.worker_scorers import TextGenerator

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True)
class Generating:
    """The query of the stage.

    Attributes:
        plan: model, settings and tables.
        total: counts of all workers; it grows while the query runs.
        query: the query that writes `generations`.
    """

    plan: GenerationPlan
    total: ScoreCounts
    query: GenerationQuery


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSummary:
    """The result of `miniplm generate`.

    Attributes:
        revision: revision of the generation; `generations` may also have rows of other revisions.
        model_revision: revision of the model that continued.
        generated: instances that the model continued.
        by_end: instances by end reason; `prompt` counts texts no longer than a prompt, which stay as they are.
        new_generated: instances that this run has added.
        rejected: instances that could not be continued.
        tokens: tokens that this run has generated.
        tokens_per_second: generated tokens per second of a worker's time in the model; None if nothing was generated.
        seconds: duration of the run.
        too_many_rejects: whether rejects exceed `score.max_reject_share`.
    """

    revision: str
    model_revision: str
    generated: int
    by_end: dict[str, int]
    new_generated: int
    rejected: int
    tokens: int
    tokens_per_second: float | None
    seconds: float
    too_many_rejects: bool


def required(config: ExperimentConfig) -> GenerateConfig:
    """The section `generate`.

    Args:
        config: the experiment.

    Raises:
        ConfigError: the config has none.
    """
    if config.generate is None:
        raise ConfigError("generate: expected a section, found none (`generate: {}` takes the defaults)")
    return config.generate


def prepare(
    spark: "SparkSession", config: ExperimentConfig, run_id: str, factory: Callable[[], TextGenerator] | None = None
) -> Generating:
    """Returns the description of the model and the query, which is not started.

    Args:
        spark: the session.
        config: the experiment.
        run_id: id of the command, written with each row.
        factory: makes the generator, used instead of the model's.

    Raises:
        ConfigError: there is no section `generate`, or a setting of the model is wrong.
        CorpusError: there is no table of instances.
        ModelLoadError: the model is missing, or cannot be used.
    """
    settings = required(config)
    model = with_absolute_path(config.models[settings.model])
    description = describe_models(spark, config, {settings.model: model})[settings.model]
    plan = GenerationPlan(
        model=description,
        settings=settings,
        workers=config.score,
        factory=factory or ModelGeneratorFactory(model, description, settings, config.score),
        layout=config.layout,
        run_id=run_id,
        split_model=None if model.device_map is None else settings.model,
    )
    total = ScoreCounts()
    return Generating(plan, total, GenerationQuery(spark, plan, total))


def summarize(spark: "SparkSession", config: ExperimentConfig, done: Generating, seconds: float) -> GenerationSummary:
    """Returns the summary of a run of the query.

    Args:
        spark: a session.
        config: the experiment.
        done: the query that has run.
        seconds: duration of the run.

    Raises:
        CorpusError: no instance was continued, and no more rows will come (`stream.trigger: available_now`).
    """
    from pyspark.sql import functions as F

    plan = done.plan
    rows = tables.read(spark, config.layout.table("generations")).where(F.col("generation_revision") == plan.revision)
    by_end = {row["end_reason"]: row["count"] for row in rows.groupBy("end_reason").count().collect()}
    rejects = tables.read(spark, config.layout.table("rejects")).where(F.col("stage") == plan.stage)
    n_rejected, n_rows = rejects.count(), sum(by_end.values())
    n_generated = n_rows - by_end.get("prompt", 0)
    if not n_generated and config.stream.trigger == "available_now":
        raise CorpusError(
            f"generations: expected instances of the split `pool` with more than {plan.settings.prompt_tokens} tokens, "
            f"found none ({by_end.get('prompt', 0)} shorter ones, {n_rejected} rejects): lower generate.prompt_tokens, "
            "or check the table rejects, ingest.split and generate.sample"
        )
    counts = done.total.of(plan.model.model_id)
    return GenerationSummary(
        revision=plan.revision,
        model_revision=plan.model.model_revision,
        generated=n_generated,
        by_end=by_end,
        new_generated=counts.n_scored,
        rejected=n_rejected,
        tokens=counts.n_tokens,
        tokens_per_second=counts.tokens_per_second,
        seconds=round(seconds, 3),
        too_many_rejects=n_rejected > config.score.max_reject_share * (n_rejected + n_rows),
    )
