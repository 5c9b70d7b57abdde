"""Trains the reference LM on the reference split, once, with the teacher's tokenizer; then it is frozen.

Reads `instances` (split = reference); writes `packed/reference/<alias>` and `<root>/models/<reference>`. The packing is
Spark's; the training is a process of its own. A reference that exists is kept, even if new text came or the config
changed; `--retrain-reference` trains it again.

    miniplm reference -c conf/demo.yaml [--retrain-reference] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/reference.py -c conf/demo.yaml
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.pack import PackedSummary, run_reference
from jobs.stage import Options
from jobs.stage_runner import stage_main
from jobs.trainer_process import run_trainer
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.store.model_records import read_training

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


LOGGER = logging.getLogger("miniplm.jobs")

# Above this share of the loss of guessing, a model knows little more than how frequent each token is.
_WEAK_SHARE = 0.65


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
    if warning := weakness(config, config.reference.alias):
        LOGGER.warning("%s", warning)
    return ReferenceSummary(packed=packing.packed, seconds=packing.seconds, model=model)


def weakness(config: ExperimentConfig, alias: str) -> str | None:
    """Returns a warning about a reference that has learned too little to tell texts apart; None if it has not.

    Args:
        config: the experiment.
        alias: alias of the trained reference.
    """
    record, facts = read_training(config, alias), storage.read_json(config.layout.model(alias, "config.json"))
    n_ids = (facts or {}).get("vocab_size")
    if record is None or record.final_loss is None or not isinstance(n_ids, int):
        return None
    guessing = math.log(n_ids)
    if record.final_loss <= _WEAK_SHARE * guessing:
        return None
    return (
        f"reference: its loss is {record.final_loss:.2f} nats/token at the end of its training, and guessing has "
        f"{guessing:.2f}: it knows little more than how frequent each token is, so the difference is the teacher's "
        "loss alone; train it longer (reference.train.steps), larger (reference.architecture) or with a higher "
        "reference.train.learning_rate, with `miniplm reference --retrain-reference`, before the corpus is scored"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm reference` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("reference", argv)


if __name__ == "__main__":
    sys.exit(main())
