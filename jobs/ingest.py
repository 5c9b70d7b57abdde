"""ingest: files or a Delta table to `instances` and `rejects`, as a stream that runs to the end of what is there.

Reads `ingest.input`: JSONL (plain, .gz, .zst), Parquet or a Delta table. Writes `<root>/tables/instances` and
`rejects`. Run again, it takes up what is new: a file delivered twice changes nothing. Driver only; the
work is in `miniplm_udf.ingestion.ingest` (executors) and `miniplm_udf.ingestion.ingest_query` (driver).

    miniplm ingest -c conf/demo.yaml root=/data/run1 ingest.input='/texts/*.jsonl.gz'
    spark-submit --properties-file conf/spark/local.conf jobs/ingest.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import stage_main
from miniplm_udf.config import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Ingests all that is new; returns the summary of `miniplm_udf.ingestion.ingest_query.ingest`."""
    from miniplm_udf.ingestion.ingest_query import ingest

    return ingest(spark, config)


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("ingest", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
