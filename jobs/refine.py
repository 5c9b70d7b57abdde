"""`miniplm refine`: score_matrix -> a new version of each refined corpus.

Reads `score_matrix` and the models' records, writes `refined/<name>` and `corpora`. A corpus whose config and inputs
have not changed is left as it is. Needs no GPU: change a ratio and run again.

    miniplm refine -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/refine.py -c conf/demo.yaml
"""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.session import stage_main
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.refine import refine

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Refines the named corpora, or all.

    Raises:
        ConfigError: the config has no corpora, or an expression is wrong.
        CorpusError: there is no matrix, or a corpus would be empty.
    """
    start = time.monotonic()
    chosen = list(config.refine.corpora) if names is None else list(names)
    if not chosen:
        raise ConfigError("refine.corpora: expected at least one corpus, found none; conf/demo.yaml has examples")
    refined = {name: refine(spark, config, name) for name in chosen}
    return {
        "kept": {name: found["n_instances"] for name, found in refined.items()},
        "refined": refined,
        "seconds": round(time.monotonic() - start, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return stage_main("refine", run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
