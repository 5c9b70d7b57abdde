"""`miniplm annotate`: instances -> annotations, columns of the texts for refinement to use.

Reads `instances` (split = pool) and the evaluation files of `annotate.contamination`; writes `annotations`. A rerun
annotates only new instances, unless the section or the files have changed. Driver only; the work is in
`miniplm_udf.annotations`.

    miniplm annotate -c conf/demo.yaml 'annotate={duplicates: true, near_duplicates: {}, language: true, quality: true}'
    spark-submit --properties-file conf/spark/local.conf jobs/annotate.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from miniplm_udf.annotations.annotate import AnnotationSummary, annotate
from miniplm_udf.config.experiment import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> AnnotationSummary:
    """Annotates all new instances.

    Args:
        spark: the command's session.
        config: the experiment.

    Returns:
        The state of `annotations` after the run.
    """
    return annotate(spark, config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm annotate` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("annotate", argv)


if __name__ == "__main__":
    sys.exit(main())
