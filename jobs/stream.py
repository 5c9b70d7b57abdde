"""`miniplm stream`: a scoring service. Files appear; instances, scores and matrix rows follow, until told to stop.

Runs the queries of `ingest`, `score` and the matrix at once in one session, every `stream.interval_seconds`. SIGTERM
lets the running micro-batches finish. Killed at any moment, the next start goes on from there. `miniplm status` tells
where it stands, from any machine that reaches the root; `stream.metrics_port` serves the same to Prometheus. The models
must be there: train the reference first (`miniplm ingest`, `miniplm reference`).

    miniplm stream -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/standalone.conf jobs/stream.py -c conf/demo.yaml
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs import score
from jobs.session import stage_main
from miniplm_udf import scores
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.ingestion.ingest_query import ingest_query
from miniplm_udf.ingestion.inputs import find_inputs, input_state
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.jobs")


def run(
    spark: "SparkSession", config: ExperimentConfig, factories: Mapping[str, scores.Factory] | None = None
) -> dict[str, Any]:
    """Runs until it is asked to stop.

    Args:
        factories: makers of scorers by alias, instead of the models' own.

    Returns:
        The summary of `jobs.score.run`.

    Raises:
        ConfigError, ModelLoadError, CorpusError: before anything starts, as the stages' own.
    """
    start = time.monotonic()
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, trigger="processing_time"))
    _wait_for_input(spark, config)
    ingesting = ingest_query(spark, config, find_inputs(spark, config.ingest))
    prepared = score.prepare(spark, config, factories)
    QueryRunner(spark, config.root, config.stream).run([ingesting, prepared.scoring, prepared.keeping])
    return score.summary(spark, config, prepared, time.monotonic() - start)


def _wait_for_input(spark: "SparkSession", config: ExperimentConfig) -> None:
    """Returns when there is a file to tell the format from."""
    told = False
    while config.ingest.inputs and not input_state(spark, config.ingest):
        if not told:
            LOGGER.info("ingest: waiting for the first file of %s", config.ingest.inputs)
            told = True
        time.sleep(config.stream.interval_seconds)


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("stream", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
