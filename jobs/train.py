"""Trains the students of the config on their packed tables, as a process of its own (torch; no JVM, no Spark).

Reads `packed/<corpus>/<tokenizer>`; writes `<root>/models/<student>` and MLflow runs. A finished student is left as it
is; after a kill, the same command continues from the last checkpoint.

    miniplm train -c conf/demo.yaml [--student NAME ...] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/train.py -c conf/demo.yaml
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage import Options
from jobs.stage_runner import stage_main
from jobs.trainer_process import run_trainer
from miniplm_udf.config.experiment import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """The result of `miniplm train`: URIs of the model folders by student."""

    students: dict[str, str]


def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> TrainSummary:
    """Trains the students; returns the summary of the stage.

    Args:
        spark: not used.
        config: the experiment.
        options: the students to train (none: all), and the command line for the trainer's process.

    Raises:
        ConfigError, MiniplmError: the trainer refused the config, or failed.
    """
    chosen = [word for name in options.students for word in ("--student", name)]
    run_trainer("train", options.config_path, options.overrides, *chosen)
    return TrainSummary(students={name: config.layout.model(name) for name in options.students or config.students})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm train` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("train", argv)


if __name__ == "__main__":
    sys.exit(main())
