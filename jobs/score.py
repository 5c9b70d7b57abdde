"""`miniplm score`: instances -> scores -> score_matrix, with every configured model.

Reads `instances` (split = pool), appends to `scores` and `rejects`, keeps `score_matrix` up to date; writes the models'
records `<root>/models/<alias>.json`. Two Structured Streaming queries with checkpoints under `<root>/_checkpoints/`; an
instance that has a score with the same weights and settings is never scored again. A rerun continues after a kill.
Driver only; the work is in `miniplm_udf.scores`.

    miniplm score -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/score.py -c conf/demo.yaml
"""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.session import new_run_id
from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.scores.halves import measure_gains
from miniplm_udf.scores.plan import ScorerFactory
from miniplm_udf.scores.run import prepare
from miniplm_udf.scores.summary import ScoreSummary, summarize
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, ScorerFactory] | None = None
) -> ScoreSummary:
    """Scores the pool instances that have no score yet, and brings the matrix up to date.

    With `stream.trigger: processing_time` it goes on with new instances until SIGTERM or SIGINT.

    Args:
        spark: the session.
        config: the experiment.
        factories: makers of scorers by alias, used instead of the models'.

    Returns:
        The counts of the tables, and of this run.

    Raises:
        CorpusError: there is nothing to score, or a model scored nothing at all.
        ModelLoadError: a model is missing, or cannot be scored with.
    """
    start = time.monotonic()
    prepared = prepare(spark, config, new_run_id(), factories)
    runner = QueryRunner(spark, config.root, config.stream)
    if config.stream.trigger == "available_now":
        # The matrix ends where the scores end when it starts, so it starts after them.
        runner.run([prepared.scoring])
        runner.run([prepared.keeping])
        if factories is None:
            measure_gains(spark, config, prepared.plan)
    else:
        runner.run([prepared.scoring, prepared.keeping])
    seconds = time.monotonic() - start
    return summarize(spark, config, prepared.plan, prepared.descriptions, prepared.total, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm score` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("score", argv)


if __name__ == "__main__":
    sys.exit(main())
