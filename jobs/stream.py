"""`miniplm stream`: a service. Ingests new files, scores them and updates the matrix, until it is stopped.

Runs the queries of `ingest`, `score` and the matrix at once in one session, every `stream.interval_seconds`. SIGTERM
lets the running micro-batches finish. After a kill, the next start continues from the checkpoints. `miniplm status`
shows its progress from any machine that can read the root; `stream.metrics_port` serves the same to Prometheus. The
models must exist: train the reference first (`miniplm ingest`, `miniplm reference`). Driver only.

    miniplm stream -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/stream.py -c conf/demo.yaml
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.session import new_run_id
from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.ingestion.inputs import input_state
from miniplm_udf.ingestion.query import IngestQuery, find_new_inputs
from miniplm_udf.scores.plan import ScorerFactory
from miniplm_udf.scores.run import prepare
from miniplm_udf.scores.summary import ScoreSummary, summarize
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")


def run(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, ScorerFactory] | None = None
) -> ScoreSummary:
    """Runs until it is asked to stop.

    Args:
        factories: makers of scorers by alias, used instead of the models'.

    Returns:
        The summary of `jobs.score.run`.

    Raises:
        ConfigError, ModelLoadError, CorpusError: `ingest` or `score` cannot run; raised before any query starts.
    """
    start = time.monotonic()
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, trigger="processing_time"))
    _wait_for_input(spark, config)
    ingesting = IngestQuery(spark, config, *find_new_inputs(spark, config))
    prepared = prepare(spark, config, new_run_id(), factories)
    QueryRunner(spark, config.root, config.stream).run([ingesting, prepared.scoring, prepared.keeping])
    seconds = time.monotonic() - start
    return summarize(spark, config, prepared.plan, prepared.descriptions, prepared.total, seconds)


def _wait_for_input(spark: "SparkSession", config: ExperimentConfig) -> None:
    """Waits until the input has a file, whose name shows the format."""
    is_logged = False
    while config.ingest.inputs and not input_state(spark, config.ingest):
        if not is_logged:
            LOGGER.info("ingest: waiting for the first file of %s", config.ingest.inputs)
            is_logged = True
        time.sleep(config.stream.interval_seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm stream` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("stream", argv)


if __name__ == "__main__":
    sys.exit(main())
