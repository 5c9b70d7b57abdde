"""Writes the HTML report of an experiment.

    miniplm report -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/report.py -c conf/demo.yaml

Reads:  instances, rejects, scores, score_matrix, corpora, refined/*; <root>/models/*; MLflow.
Writes: report.html in the report folder, and the artifacts of the MLflow run "comparison". A rerun replaces both.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import stage_main
from jobs.summary import build_summary, write_summary
from miniplm_udf.config import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Writes summary.json over the stages that have run so far, and the report.

    Returns:
        {"report": path, "seconds"}.
    """
    from miniplm_udf.report.render import build_report  # matplotlib and jinja2: not for `--help`

    started = time.monotonic()
    summary = build_summary(config)
    write_summary(config, summary)
    path = build_report(spark, config, summary)
    return {"report": str(path), "seconds": time.monotonic() - started}


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("report", run, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
