"""Trains the reference LM on the reference split, once, with the teacher's tokenizer; then it is frozen.

Reads `instances` (split = reference); writes `packed/reference/<alias>` and `<root>/models/<reference>`. The packing is
Spark's; the training is a process of its own. A reference that exists is kept, even if new text came or the config
changed; `--retrain-reference` trains it again.

    miniplm reference -c conf/demo.yaml [--retrain-reference] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/reference.py -c conf/demo.yaml
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.pack import PackedSummary, run_reference
from jobs.stage import Options
from jobs.stage_runner import stage_main
from jobs.trainer_process import run_trainer
from miniplm_udf.config.experiment import ExperimentConfig

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSummary(PackedSummary):
    """The result of `miniplm reference`: the packed reference split, and `model`, the URI of the model folder."""

    model: str


def run(spark: "SparkSession", config: ExperimentConfig, options: Options) -> ReferenceSummary:
    """Packs the reference split and trains the reference on it; returns the summary of the stage.

    Args:
        spark: the session.
        config: has the section `reference`.
        options: the command line, for the trainer's process.

    Raises:
        CorpusError: there is nothing to train on.
        ConfigError, MiniplmError: the trainer refused the config, or failed.
    """
    assert config.reference is not None
    packing = run_reference(spark, config)
    retrain = ["--retrain"] if options.retrain_reference else []
    run_trainer("train", options.config_path, options.overrides, "--reference", *retrain)
    model = config.layout.model(config.reference.alias)
    return ReferenceSummary(packed=packing.packed, seconds=packing.seconds, model=model)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm reference` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("reference", argv)


if __name__ == "__main__":
    sys.exit(main())
