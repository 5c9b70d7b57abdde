"""Ingests files or a Delta table into `instances` and `rejects`, as a stream that ends with the input.

Reads `ingest.input`: files of one format (docs/ingest.md) or a Delta table. Writes `<root>/tables/instances` and
`rejects`. A rerun ingests only new files and rows; a file that is delivered twice changes nothing. Driver only; the
work is in `miniplm_udf.ingestion.splits` (executors) and `miniplm_udf.ingestion.query` (driver).

    miniplm ingest -c conf/demo.yaml root=/data/run1 ingest.input='/texts/*.jsonl.gz'
    spark-submit --properties-file conf/spark/local.conf jobs/ingest.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.ingestion.summary import IngestSummary

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> IngestSummary:
    """Ingests all new input.

    Args:
        spark: the command's session.
        config: the experiment.

    Returns:
        The counts of the tables, and of this run.
    """
    from miniplm_udf.ingestion.query import ingest

    return ingest(spark, config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm ingest` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("ingest", argv)


if __name__ == "__main__":
    sys.exit(main())
