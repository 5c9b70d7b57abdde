"""Evaluates the students, and the reference, in a process of its own (torch, no JVM; starts no Spark either).

Reads `instances` (split = heldout), the sets of `evaluate.inputs`, and `<root>/models/*`; runs `evaluate.tasks` with
lm-eval. Writes `<root>/models/<name>/evaluation.json`, and the same numbers to the models' MLflow runs. What exists for
the same weights, texts and settings is left as it is, so a retry measures only what is missing. `--student NAME`
evaluates one student. docs/evaluation.md describes the numbers.

    miniplm evaluate -c conf/demo.yaml [--student NAME] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/evaluate.py -c conf/demo.yaml
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage import Options
from jobs.stage_runner import stage_main
from jobs.trainer_process import run_trainer
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.store.model_records import Evaluation, read_evaluation

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSummary:
    """The result of `miniplm evaluate`: the content of `evaluation.json` by student; None: it has none."""

    students: dict[str, Evaluation | None]


def run(spark: "SparkSession | None", config: ExperimentConfig, options: Options) -> EvaluateSummary:
    """Evaluates students; returns the summary of the stage.

    Args:
        spark: not used.
        config: the experiment.
        options: the command line, for the trainer's process.

    Raises:
        ConfigError, MiniplmError: the trainer refused the config, or failed.
    """
    chosen = [word for name in options.students for word in ("--student", name)]
    run_trainer("evaluate", options.config_path, options.overrides, *chosen)
    names = options.students or list(config.students)
    return EvaluateSummary(students={name: read_evaluation(config, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm evaluate` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
