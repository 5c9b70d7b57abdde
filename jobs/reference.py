"""Trains the reference LM on the reference split, once, with the teacher's tokenizer; then it is frozen.

Reads `instances` (split = reference); writes `packed/reference/<alias>` and `<root>/models/<reference>`. The packing is
Spark's; the training is a process of its own. A reference that exists is kept, even if new text came or the config
changed; `--retrain-reference` trains it again.

    miniplm reference -c conf/demo.yaml [--retrain-reference] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/reference.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from jobs.stages import Options
from jobs.trainer_process import run_trainer
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig, options: Options) -> Json:
    """Packs the reference split and trains the reference on it.

    Args:
        spark: the session.
        config: has the section `reference`.
        options: the command line, for the trainer's process.

    Returns:
        The summary of `jobs.pack.run_reference`, and `model`: URI of the model folder.

    Raises:
        CorpusError: there is nothing to train on.
        ConfigError, MiniplmError: the trainer refused the config, or failed.
    """
    from jobs.pack import run_reference

    assert config.reference is not None
    summary = run_reference(spark, config)
    retrain = ["--retrain"] if options.retrain_reference else []
    run_trainer("train", options.config_path, options.overrides, "--reference", *retrain)
    return {**summary, "model": config.layout.model(config.reference.alias)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm reference` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("reference", argv)


if __name__ == "__main__":
    sys.exit(main())
