"""`miniplm annotate`: instances -> annotations, columns of the texts for refinement to use.

Reads `instances` (split = pool) and the evaluation files of `annotate.contamination`; writes `annotations`. Run again,
it annotates what is new; what is annotated already, by the same section and files, is left as it is. Driver only; the
work is in `miniplm_udf.annotations`.

    miniplm annotate -c conf/demo.yaml 'annotate={duplicates: true, near_duplicates: {}, language: true, quality: true}'
    spark-submit --properties-file conf/spark/local.conf jobs/annotate.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import stage_main
from miniplm_udf.config import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Annotates all that is new; returns the summary of `miniplm_udf.annotations.annotate.annotate`."""
    from miniplm_udf.annotations.annotate import annotate

    return annotate(spark, config)


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("annotate", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
