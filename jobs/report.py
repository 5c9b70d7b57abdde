"""Writes the HTML report of an experiment.

Reads:  instances, rejects, scores, score_matrix, corpora, refined/*; <root>/models/*; MLflow.
Writes: report.html in the report folder, and the artifacts of the MLflow run "comparison". A rerun replaces both.

    miniplm report -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/report.py -c conf/demo.yaml
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from jobs.summary import build_summary, write_summary
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.lease import Lease

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSummary:
    """The result of `miniplm report`: the place of the HTML file (a path or URI), and the seconds that it took."""

    report: str
    seconds: float


def run(spark: "SparkSession", config: ExperimentConfig) -> ReportSummary:
    """Writes summary.json of the stages that have run so far, and the report; returns the summary of the stage.

    Args:
        spark: the command's session.
        config: the experiment.
    """
    from miniplm_udf.report.render import build_report  # imports matplotlib and jinja2, which `--help` does not need

    started = time.monotonic()
    summary = build_summary(config)
    write_summary(config, summary)
    with Lease(config.layout.lease("report"), "report", waits=True):
        place = build_report(spark, config, summary)
    return ReportSummary(report=storage.redact(place), seconds=time.monotonic() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm report` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("report", argv)


if __name__ == "__main__":
    sys.exit(main())
