"""Measures the held-out loss of the students, and of the reference, in a process of its own (torch, no JVM).

Reads `instances` (split = heldout) and `<root>/models/*`; writes `<root>/models/<name>/evaluation.json`, and the same
numbers to the models' MLflow runs. An unchanged evaluation is left as it is, so a retry measures only what is missing.

    miniplm evaluate -c conf/demo.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/evaluate.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from jobs.stages import Options
from jobs.trainer_process import run_trainer
from miniplm_udf.config.experiment import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig, options: Options) -> dict[str, list[str]]:
    """Evaluates all students.

    Args:
        spark: not used.
        config: the experiment.
        options: the command line, for the trainer's process.

    Returns:
        {"students": names}.

    Raises:
        ConfigError, MiniplmError: the trainer refused the config, or failed.
    """
    run_trainer("evaluate", options.config_path, options.overrides)
    return {"students": list(config.students)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm evaluate` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
